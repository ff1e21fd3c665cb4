#!/usr/bin/env bash
# Trains on the GPUs of several nodes, one process per node. From the repository on a shared file system:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=experiments/huginn_1b.py --workdir=runs/x
#   bash launch/slurm.sh --dry_run ...  prints the commands and runs none
# Stopped by the time limit, a hang or a lost node, the job saves where it can, queues itself again and continues; by
# hangs and lost nodes five times in a row at most.
#SBATCH --job-name=latent_loop
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" # sbatch runs a copy of this file from elsewhere

dry_run=
if [ "${1:-}" = --dry_run ]; then
  dry_run=1
  shift
fi
# The run saves five minutes ahead of the job's end by itself; the signal above is for clusters that do not tell the end.
time_limit() {
  local minutes
  if [ -n "${SLURM_JOB_END_TIME:-}" ]; then
    minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 5))
    echo "--time_limit=$((minutes > 1 ? minutes : 1))"
  fi
}
final=slurm-${SLURM_JOB_ID:-JOB}.final       # the exit codes of tasks that must not start again
failures=slurm-${SLURM_JOB_ID:-JOB}.failures # one line for each failed try in a row
train=(bash launch/slurm_task.sh "$final" python -u -m launch.train --cluster=slurm --wait_secs=3600)
train=(srun --label --wait=60 "${train[@]}") # a task that outlives the first one's end by a minute hangs
if [ -n "$dry_run" ]; then
  echo "bash -c 'source launch/env.sh; ensure_environment launch/requirements/cuda.txt'"
  echo "${train[@]}" $(time_limit) "$@"
  echo "scontrol requeue \$SLURM_JOB_ID  # after exit code 10, 12 or 14"
  exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is no SLURM job; write: sbatch --nodes=N --gpus-per-node=G launch/slurm.sh FLAGS" >&2
  exit 2
fi
source launch/env.sh
ensure_environment launch/requirements/cuda.txt
: >"$final" # not removed: a shared file system may hide for a while what another node creates
code=0
"${train[@]}" $(time_limit) "$@" || code=$?
cause=$(head -n 1 "$final")
rm -f "$final"
if [ -n "$cause" ]; then
  rm -f "$failures"
  echo "error: a task ended with exit code $cause, which the same command would come to again; look at its output" >&2
  exit "$cause"
fi
failed=0
if [ "$code" -eq 12 ] || [ "$code" -eq 14 ] || [ "$code" -gt 128 ]; then # a hang, or a process was lost
  echo "$code" >>"$failures"
  failed=$(wc -l <"$failures")
else
  rm -f "$failures"
fi
if [ "$failed" -gt 5 ]; then # lest a broken node burn the budget
  rm -f "$failures"
  echo "error: exit code $code, the sixth such end in a row; look at the output above, and submit the same command again" \
    "to go on" >&2
elif [ "$failed" -gt 0 ] || [ "$code" -eq 10 ]; then # 10: stopped and saved, as by every time limit
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
