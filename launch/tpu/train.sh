#!/usr/bin/env bash
# One training stage on all workers of a TPU VM slice; the processes find each other by the slice's own metadata.
#
#   NAME=infimed ZONE=us-east5-a launch/tpu/train.sh configs/models/foundation_4b.yaml configs/stages/pretrain.yaml \
#     data.dataset=/mnt/data/pretrain data.tokenizer=/mnt/data/qwen3 train.output=/mnt/data/runs/pretrain
#
# The slice must exist (launch/tpu/create.sh). YAML files become --config, the rest are settings. The same line again
# continues a stopped run. Data and output are under the same path on every worker (a mounted bucket or disk).
set -euo pipefail

: "${NAME:?the slice: NAME=infimed}"
: "${ZONE:?its zone: ZONE=us-east5-a}"
CHECKOUT=${CHECKOUT:-infimed-jax} # edit: where launch/tpu/create.sh put the checkout, in the home folder of each worker

arguments=()
for argument in "$@"; do
  case $argument in
    *.yaml) arguments+=(--config "$argument") ;;
    *) arguments+=("$argument") ;;
  esac
done

# Quoted for the shell of the workers.
command=$(printf '%q ' .venv/bin/python launch/run.py train --platform tpu "${arguments[@]}")
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="cd $(printf '%q' "$CHECKOUT") && $command"
