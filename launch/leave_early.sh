#!/usr/bin/env bash
# Where do tokens leave, and what does leaving early cost? Trains tiny_text and the two tasks of think_longer.sh (whose
# runs it takes where they are), SEEDS="0 1 2", and gathers what launch.evaluate exits says of each in
# experiments/results/leave_early.json and .png. JOBS=2 at a time, of one thread each. Interrupted, start it again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
ensure_environment
keep_freed_memory
export NPROC=1

# one NAME RUN SEED [ARGUMENT...]: train and evaluate, unless that is done.
one() {
  local name=$1 run=$2 seed=$3
  shift 3
  [ ! -f "$run/exits.json" ] || return 0
  mkdir -p "$(dirname "$run")"
  echo "$run: see $run.log"
  {
    bash launch/keep_going.sh python -m launch.train "--config=experiments/$name.py" "--config.seed=$seed" "--workdir=$run"
    python -m launch.evaluate exits "--workdir=$run" --depths=16 "$@"
  } >>"$run.log" 2>&1
}
export -f one

difficulties=$(echo --difficulty={4,6,8,10,12}) # training ends at 8; no word of 2 moves is for validation
all=()
for seed in ${SEEDS:-0 1 2}; do
  all+=("tiny_text runs/leave_early/tiny_text_$seed $seed")
  for task in automaton shell_game; do
    all+=("$task runs/think_longer/${task}_$seed $seed $difficulties")
  done
done
printf '%s\n' "${all[@]}" | xargs -L 1 -P "${JOBS:-2}" bash -euc 'one "$@"' one
gather=()
for run in "${all[@]}"; do
  gather+=("--run=$(cut -d ' ' -f 2 <<<"$run")")
done
python -m launch.figure exits "${gather[@]}" --output=experiments/results/leave_early
