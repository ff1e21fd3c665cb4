#!/usr/bin/env bash
# Trains on the TPU slices of a GKE cluster that has JobSet:
#   bash launch/gke/jobset.sh [--dry_run] --name=NAME --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x4 \
#     --hosts=16 --chips=4 [--claim=CLAIM] [--slices=2] -- --config=experiments/huginn_3p5b.py --workdir=/mnt/runs/x
# hosts: per slice. chips: per host. claim: a ReadWriteMany volume, mounted at /mnt/runs; not needed when --workdir is
# gs://BUCKET/FOLDER. --dry_run prints the manifest and the command, and runs nothing. Build the image with launch/gke/Dockerfile.
set -euo pipefail
cd "$(dirname "$0")/../.."

dry_run= slices=1 name= image= accelerator= topology= hosts= chips= claim=
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=1 ;;
    --name=* | --image=* | --accelerator=* | --topology=* | --hosts=* | --chips=* | --claim=* | --slices=*)
      key=${1%%=*}
      printf -v "${key#--}" '%s' "${1#*=}"
      ;;
    --) shift && break ;;
    *)
      echo "error: $1 is no option of launch/gke/jobset.sh; flags of the training go behind --" >&2
      exit 2
      ;;
  esac
  shift
done
for key in name image accelerator topology hosts chips; do
  if [ -z "${!key}" ] || [ $# -eq 0 ]; then
    echo "error: --$key and the training's flags behind -- are needed; see the top of $0" >&2
    exit 2
  fi
done

flags=
for flag in "$@"; do # as YAML strings: a single quote inside is doubled
  flags+="${flags:+, }'${flag//\'/\'\'}'"
done
manifest=$(<launch/gke/jobset.yaml)
[ -n "$claim" ] || manifest=${manifest%$'\n'*volumeMounts:*} # they are the last lines
for key in name image accelerator topology hosts chips claim slices flags; do
  manifest=${manifest//"@$(printf %s "$key" | tr a-z A-Z)@"/"${!key}"}
done
# `apply` starts nothing where a JobSet of this name is, though it has ended. In the foreground: its pods are gone after it.
delete=(kubectl delete jobset "$name" --cascade=foreground --wait)
if [ -n "$dry_run" ]; then
  printf '%s\n' "$manifest" "${delete[*]}  # where one Failed or Completed" 'kubectl apply -f - # with the manifest above'
else
  state=$(kubectl get jobset "$name" --ignore-not-found -o 'jsonpath={.kind} {.status.terminalState}')
  case $state in
    '') ;;
    *Failed | *Completed) "${delete[@]}" ;;
    *)
      echo "error: a JobSet $name is there and has not ended; give another --name, or end it: ${delete[*]}" >&2
      exit 2
      ;;
  esac
  printf '%s\n' "$manifest" | kubectl apply -f -
  echo "watch it: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
fi
