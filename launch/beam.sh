#!/usr/bin/env bash
# launch.prepare_data by Apache Beam, in .venv_beam, since Beam needs older packages than the core:
#   bash launch/beam.sh --runner=DirectRunner --beam=--direct_num_workers=0 --beam=--direct_running_mode=multi_processing \
#     --input='docs/**/*.jsonl' --output=data/docs
#   bash launch/beam.sh --runner=FlinkRunner --beam=--flink_master=HOST:8081 ...
# Every worker needs this checkout, these packages, and the input and output folders under the same paths.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_venv .venv_beam launch/requirements/beam.txt
exec python -m launch.prepare_data "$@"
