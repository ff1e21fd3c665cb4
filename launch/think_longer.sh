#!/usr/bin/env bash
# Does thinking longer solve harder problems than any in training? Trains two tasks' models and the baselines of each,
# SEEDS="0 1 2", and gathers exact match by difficulty and depth in experiments/results/think_longer.json and .png.
# Runs are in runs/think_longer. Interrupted, start it again: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment

runs=()
for seed in ${SEEDS:-0 1 2}; do
  for task in automaton composition; do
    for name in "$task" "${task}_same_params" "${task}_same_flops"; do
      run=runs/think_longer/${name}_$seed
      if [ ! -f "$run/difficulties.json" ]; then
        bash launch/keep_going.sh python -m launch.train "--config=experiments/$name.py" "--config.seed=$seed" \
          "--workdir=$run"
        python -m launch.evaluate difficulties "--workdir=$run" \
          --difficulty={4,6,8,10,12,16} --depths={1,2,3,4,6,8,12,16,24,32}
      fi
      runs+=("--run=$run")
    done
  done
done
python -m launch.heat_map "${runs[@]}" --output=experiments/results/think_longer
