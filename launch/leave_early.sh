#!/usr/bin/env bash
# Where do tokens leave, and what does leaving early cost? Trains tiny_text and the two tasks of think_longer.sh (whose
# runs it takes where they are), SEEDS="0 1 2", and gathers what launch.evaluate exits says of each in
# experiments/results/leave_early.json and .png. JOBS=2 at a time, of one thread each. Interrupted, start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment

asked=$(echo --difficulty={4,6,8,10,12}) # training ends at 8; no word of 2 moves is for validation
all=() runs=()
for seed in ${SEEDS:-0 1 2}; do
  run=runs/leave_early/tiny_text_$seed
  all+=("exits tiny_text $seed $run --depths=16") runs+=("--run=$run")
  for task in automaton shell_game; do
    run=runs/think_longer/${task}_$seed
    all+=("exits $task $seed $run --depths=16 $asked") runs+=("--run=$run")
  done
done
side_by_side "${all[@]}"
python -m launch.figure exits "${runs[@]}" --output=experiments/results/leave_early
