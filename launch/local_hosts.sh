#!/usr/bin/env bash
# Trains with N processes of D virtual CPU devices each on this machine, to try a run of many hosts on one:
#   bash launch/local_hosts.sh [--dry_run] N D --config=experiments/tiny_text.py --workdir=runs/x [more flags of train]
# Lines begin with the process they come from. When one process fails, the others get 30 s to end by themselves; 5 s
# when it ends because nothing moves.
# The exit code is that of the first process that failed; 14 when it was killed.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh

dry_run=
if [ "${1:-}" = --dry_run ]; then
  dry_run=1
  shift
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: '${1:-} ${2:-}' is not a number of processes and one of devices; write: bash launch/local_hosts.sh 2 4" \
    "--config=experiments/tiny_text.py --workdir=runs/x" >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
[ -n "$dry_run" ] || ensure_environment

# What the environment asks of XLA stays; the number of devices comes last, so it counts.
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
export PYTHONUNBUFFERED=1
if [ -n "$dry_run" ]; then
  port=PORT
else
  port=$(python -c 'from latent_loop.parallel import ports; print(ports.free_port())')
fi

prefix() {
  local line
  while IFS= read -r line; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=()
for ((i = 0; i < processes; i++)); do
  command=(python -m launch.train --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" "$@")
  if [ -n "$dry_run" ]; then
    echo "JAX_PLATFORMS=cpu XLA_FLAGS='$XLA_FLAGS' ${command[*]} &"
  else
    "${command[@]}" > >(prefix "$i") 2> >(prefix "$i" >&2) &
    pids[i]=$!
    echo "process $i has pid ${pids[i]}"
  fi
done
[ -z "$dry_run" ] || exit 0

signal_all() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'signal_all TERM' INT TERM

# Polling, because the bash of macOS has no wait -n.
first=0 deadline= ended=()
while [ "${#ended[@]}" -lt "$processes" ]; do
  sleep 0.2 || true
  for i in "${!pids[@]}"; do
    if [ -z "${ended[i]:-}" ] && ! kill -0 "${pids[i]}" 2>/dev/null; then
      code=0
      wait "${pids[i]}" || code=$?
      ended[i]=$code
      echo "process $i ended with exit code $code" >&2
      if [ "$code" -ne 0 ] && [ "$first" -eq 0 ]; then
        first=$((code > 128 ? 14 : code))
        deadline=$((SECONDS + (first == 12 ? 5 : 30))) # who hangs does not end by itself
      fi
    fi
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    echo "killing the processes that are left" >&2
    signal_all KILL
    deadline=
  fi
done
exit "$first"
