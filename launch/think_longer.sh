#!/usr/bin/env bash
# Does thinking longer solve harder problems than any in training? Trains two tasks' models and the baselines of each,
# SEEDS="0 1 2", and gathers exact match by difficulty and depth in experiments/results/think_longer.json and .png.
# JOBS=2 runs at a time, of one thread each, in runs/think_longer. Interrupted, start it again: it continues.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment
keep_freed_memory
export NPROC=1

# one NAME SEED: train and evaluate, unless that is done.
one() {
  local run=runs/think_longer/$1_$2
  [ ! -f "$run/difficulties.json" ] || return 0
  mkdir -p runs/think_longer
  echo "$run: see $run.log"
  {
    bash launch/keep_going.sh python -m launch.train "--config=experiments/$1.py" "--config.seed=$2" "--workdir=$run"
    python -m launch.evaluate difficulties "--workdir=$run" \
      --difficulty={4,6,8,10,12,16} --depths={1,2,3,4,6,8,12,16,24,32}
  } >>"$run.log" 2>&1
}
export -f one

all=()
for seed in ${SEEDS:-0 1 2}; do
  for task in automaton shell_game; do
    all+=("$task $seed" "${task}_same_flops $seed" "${task}_same_params $seed")
  done
done
printf '%s\n' "${all[@]}" | xargs -L 1 -P "${JOBS:-2}" bash -euc 'one "$@"' one
runs=()
for run in "${all[@]}"; do
  runs+=("--run=runs/think_longer/${run/ /_}")
done
python -m launch.figure difficulties "${runs[@]}" --output=experiments/results/think_longer
