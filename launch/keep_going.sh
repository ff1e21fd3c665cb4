#!/usr/bin/env bash
# Runs a command again for as long as its exit code says that the same command goes on:
#   bash launch/keep_going.sh [--dry_run] python -m launch.train --config=experiments/tiny_text.py --workdir=runs/x
# Again after 10 (stopped, saved), 12 (a hang), 14 (a process was lost) and the end by a signal; not after the rest, and
# not when this script itself gets SIGINT or SIGTERM, which it passes on. TRIES in a row (5) that each lasted less than
# CALM seconds (600) are enough.
set -uo pipefail

dry_run=
if [ "${1:-}" = --dry_run ]; then
  dry_run=1
  shift
fi
if [ $# -eq 0 ]; then
  echo "error: no command given; write: bash launch/keep_going.sh python -m launch.train FLAGS" >&2
  exit 2
fi
if [ -n "$dry_run" ]; then
  printf '%q ' "$@" | sed 's/ $//'
  echo "  # again after exit code 10, 12, 14 or a signal"
  exit 0
fi

child= asked= code=143 # the last code; until there is one, that of an end by SIGTERM
pass_on() {
  asked=$1
  case $child in
    '') exit "$code" ;; # in the pause
    starting) ;;
    *) kill "-$1" "$child" 2>/dev/null ;;
  esac
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

short=0
while true; do
  began=$SECONDS
  # Job control gives the child its own process group: Ctrl-C reaches it once, through the trap, and bash would
  # otherwise have it ignore SIGINT.
  child=starting
  set -m
  "$@" &
  child=$!
  set +m
  [ -z "$asked" ] || kill "-$asked" "$child" 2>/dev/null # it came in between
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # the trap ended the wait, not the child
    code=0
    wait "$child" || code=$?
  done
  if [ -n "$asked" ]; then # a child that ended right after the trap has not said its code yet; 127: it has
    again=0
    wait "$child" 2>/dev/null || again=$?
    [ "$again" -eq 127 ] || code=$again
    exit "$code"
  fi
  child=
  [ -z "$asked" ] || exit "$code"
  if [ "$code" -ne 10 ] && [ "$code" -ne 12 ] && [ "$code" -ne 14 ] && [ "$code" -le 128 ]; then
    exit "$code"
  fi
  short=$((SECONDS - began < ${CALM:-600} ? short + 1 : 0))
  if [ "$short" -ge "${TRIES:-5}" ]; then
    echo "error: exit code $code, short try number $short in a row; look at the output above" >&2
    exit "$code"
  fi
  echo "exit code $code: the same command again" >&2
  sleep "${PAUSE:-5}" >/dev/null 2>&1 & # in the background, where a signal ends the wait for it
  wait $!
done
