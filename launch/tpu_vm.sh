#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM, or of the slices of a queued resource. From your own machine:
#   bash launch/tpu_vm.sh [--dry_run] --name=NAME --zone=ZONE [--type=v5p-128 --runtime=v2-alpha-tpuv5 [--spot]] \
#     [--slices=2] [--nfs=SERVER:/SHARE] -- --config=experiments/huginn_3p5b.py --workdir=/mnt/runs/x
# --type creates the queued resource first; --nfs is mounted at /mnt/runs on every worker, for the workdir.
# --dry_run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run= name= zone= type= runtime= spot= slices=1 nfs=
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=--spot ;;
    --slices=*) slices=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --) shift && break ;;
    *)
      echo "error: $1 is no option of launch/tpu_vm.sh; flags of the training go behind --" >&2
      exit 2
      ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ $# -eq 0 ] || { [ -n "$type" ] && [ -z "$runtime" ]; }; then
  echo "error: --name, --zone and the training's flags behind -- are needed, and --runtime with --type; see the top of $0" >&2
  exit 2
fi

show() {
  printf '%q ' "$@" | sed 's/ $//'
  echo
}
run() {
  show "$@"
  [ -n "$dry_run" ] || "$@"
}
on_workers() { # NODE WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$1" --zone="$zone" --worker="$2" --command="$3"
}

nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

pack() {
  git ls-files -z -co --exclude-standard -x code.tar.gz | while IFS= read -r -d '' file; do
    [ ! -e "$file" ] || printf '%s\0' "$file" # git lists a file that was deleted until that is committed
  done | tar czf code.tar.gz --null -T -
}
wait_for_resource() { # COMMAND that says its state
  local state failed=0
  while true; do
    state=$("$@") && failed=0 || failed=$((failed + 1))
    if [ "$failed" -ge 10 ]; then # in a row: one may be of the network
      echo "error: gcloud does not say the state of $name (see above); start again without --type once it is ACTIVE" >&2
      exit 2
    fi
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "error: the queued resource $name is $state and will not come up; see why with gcloud compute tpus" \
          "queued-resources describe $name --zone=$zone, delete it there and start again" >&2
        exit 2
        ;;
    esac
    sleep 30
  done
}

# What git tracks and what is new, not only what is committed: the experiment at hand counts. First, since it costs nothing.
echo 'git ls-files -z -co --exclude-standard | tar czf code.tar.gz --null -T -  # without deleted files'
[ -n "$dry_run" ] || pack

if [ -n "$type" ]; then
  place=(--node-id="$name")
  [ "$slices" -eq 1 ] || place=(--node-count="$slices" --node-prefix="$name")
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" --zone="$zone" --accelerator-type="$type" \
    --runtime-version="$runtime" $spot
  state=(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)')
  show "${state[@]}"
  [ -n "$dry_run" ] || wait_for_resource "${state[@]}"
fi

printf -v flags ' %q' "$@"
# Images come with Python 3.10. The share is mounted once.
setup='set -eu; mkdir -p latent_loop; tar xzf code.tar.gz -C latent_loop; cd latent_loop
command -v python3.11 >/dev/null || { sudo apt-get update -q; sudo apt-get install -qy python3.11 python3.11-venv; }
PYTHON=python3.11 bash -euo pipefail -c "source launch/env.sh; ensure_environment launch/requirements/tpu.txt"'
if [ -n "$nfs" ]; then
  setup+="
command -v mount.nfs >/dev/null || sudo apt-get install -qy nfs-common
mountpoint -q /mnt/runs || { sudo mkdir -p /mnt/runs; sudo mount -t nfs $nfs /mnt/runs; }"
fi
# --worker=all shows nothing before all have ended, so the training goes to the background and to a file. The processes
# wait long for each other, unless the flags say otherwise: after a restart a machine may be slow to come back.
start="cd latent_loop; nohup bash launch/keep_going.sh .venv/bin/python -u -m launch.train --cluster=tpu --wait_secs=3600$flags >>train.log 2>&1 </dev/null & sleep 1"

for node in "${nodes[@]}"; do
  on_workers "$node" 0 true # the first connection spreads the key; to all at once it fails now and then
  run gcloud compute tpus tpu-vm scp code.tar.gz "$node:" --zone="$zone" --worker=all
  on_workers "$node" all "$setup"
done
for node in "${nodes[@]}"; do
  on_workers "$node" all "$start"
done
on_workers "${nodes[0]}" 0 'tail -n 100 -F latent_loop/train.log'
