#!/usr/bin/env bash
# Trains on the GPUs of several nodes, one process per node. From the repository on a shared file system:
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh --config=experiments/huginn_1b.py --workdir=runs/x
#   bash launch/slurm.sh --dry_run ...  prints the commands and runs none
# Stopped by the time limit, a hang or a lost node, the job saves where it can, queues itself again and continues.
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
limit=()
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then
  limit=(--time_limit="$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - 5))")
fi
# A task that outlives the first one's end by a minute hangs.
train=(srun --label --wait=60 python -u -m launch.train --cluster=slurm "${limit[@]}" "$@")
if [ -n "$dry_run" ]; then
  echo "bash -c 'source launch/env.sh; ensure_environment launch/requirements/cuda.txt'"
  echo "${train[@]}"
  echo "scontrol requeue \$SLURM_JOB_ID  # after exit code 10, 12 or 14"
  exit 0
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is no SLURM job; write: sbatch --nodes=N --gpus-per-node=G launch/slurm.sh FLAGS" >&2
  exit 2
fi
source launch/env.sh
ensure_environment launch/requirements/cuda.txt
code=0
"${train[@]}" || code=$?
# 10: stopped and saved; 12: a hang; 14, or a signal: a process was lost. Five times, lest a broken node burn the budget.
if { [ "$code" -eq 10 ] || [ "$code" -eq 12 ] || [ "$code" -eq 14 ] || [ "$code" -gt 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
