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
asked=
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM
trap 'asked=1; kill -USR1 "$child" 2>/dev/null' USR1
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the command
  wait "$child"
  code=$?
done
if [ -n "$asked" ]; then # one that ended right after the signal has not said its code yet; 127: it has
  wait "$child" 2>/dev/null
  again=$?
  [ "$again" -eq 127 ] || code=$again
fi
case $code in
  1 | 2 | 11 | 13) echo "$code" >>"$file" ;;
esac
exit "$code"
