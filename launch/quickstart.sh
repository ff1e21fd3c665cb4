#!/usr/bin/env bash
# From nothing to two trained models with their depth reports. Interrupted, start it again: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment
keep_freed_memory

echo
echo "1 of 2: a language model on the text that Python ships (runs/tiny_text)"
python -m launch.train --config=experiments/tiny_text.py --workdir=runs/tiny_text
echo
echo "2 of 2: a task where thinking longer pays (runs/tiny_task)"
python -m launch.train --config=experiments/tiny_task.py --workdir=runs/tiny_task

cat <<'END'

Done. Look at
  runs/tiny_text/depth_report.html   loss against test-time depth; samples in runs/tiny_text/samples.txt
  runs/tiny_task/depth_report.html   accuracy against test-time depth
Next, let the text model write at a depth of your choice:
  source .venv/bin/activate
  python -m launch.generate --workdir=runs/tiny_text --prompt='def ' --depth=16
END
