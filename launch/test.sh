#!/usr/bin/env bash
# All checks and tests; arguments go to pytest: bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment launch/requirements/dev.txt launch/requirements/data.txt launch/requirements/server.txt \
  launch/requirements/tpu.txt ${CI:+launch/requirements/interop.txt}
# Gigabytes of PyTorch (interop.txt) come with CI=1, which a CI sets by itself; without, its tests are skipped and say so.

unset PYTHONDONTWRITEBYTECODE # the tests start a hundred processes, which need not compile the same files each
ruff check .
ruff format --check --quiet .
# A worker that crashes ends the run, since xdist would wait for ever for the rest of its file.
# In the order of their names: xdist would leave files with few tests to the end, and those are the slowest.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 "$@"
