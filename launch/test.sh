#!/usr/bin/env bash
# All checks and tests; arguments go to pytest: bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment launch/requirements/dev.txt launch/requirements/data.txt launch/requirements/server.txt \
  launch/requirements/tpu.txt
# launch/requirements/interop.txt (PyTorch) is left to whoever wants its tests: without it they are skipped and say so.

unset PYTHONDONTWRITEBYTECODE # the tests start a hundred processes, which need not compile the same files each
ruff check .
ruff format --check --quiet .
# In the order of their names: xdist would leave files with few tests to the end, and those are the slowest.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
