#!/usr/bin/env bash
# One task of launch/slurm.sh: runs a command, and notes in FILE an exit code after which the same command would end alike:
#   bash launch/slurm_task.sh FILE COMMAND...
# srun says the highest code of all tasks, and 14 of those that lost a peer is above the 1 or 13 of that one.
set -uo pipefail
file=$1
shift

"$@" &
child=$!
# SLURM signals this shell, and the command or not, as the cluster is set up.
trap 'kill -TERM "$child"' TERM
trap 'kill -USR1 "$child"' USR1
while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ended the wait, not the command
case $code in
  1 | 2 | 11 | 13) echo "$code" >>"$file" ;;
esac
exit "$code"
