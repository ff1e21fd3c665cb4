#!/usr/bin/env bash
# Does thinking longer solve harder problems than any in training? Trains two tasks' models and the baselines of each,
# SEEDS="0 1 2", and gathers exact match by difficulty and depth in experiments/results/think_longer.json and .png.
# JOBS=2 runs at a time, of one thread each, in runs/think_longer. Interrupted, start it again: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment

asked=$(echo --difficulty={4,6,8,10,12,16} --depths={1,2,3,4,6,8,12,16,24,32})
all=() runs=()
for seed in ${SEEDS:-0 1 2}; do
  for task in automaton shell_game; do
    for experiment in "$task" "${task}_same_flops" "${task}_same_params"; do
      run=runs/think_longer/${experiment}_$seed
      all+=("difficulties $experiment $seed $run $asked") runs+=("--run=$run")
    done
  done
done
side_by_side "${all[@]}"
python -m launch.figure difficulties "${runs[@]}" --output=experiments/results/think_longer
