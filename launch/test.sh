#!/usr/bin/env bash
# All checks and tests; arguments go to pytest: bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment launch/requirements/dev.txt launch/requirements/data.txt launch/requirements/server.txt \
  launch/requirements/tpu.txt launch/requirements/interop.txt

ruff check .
ruff format --check --quiet .
python -m pytest -n 2 --dist loadfile "$@"
