#!/usr/bin/env bash
# A TPU VM slice with the package on every worker.
#
#   NAME=infimed ZONE=us-east5-a TYPE=v5p-64 launch/tpu/create.sh
#
# TYPE counts TensorCores for v5p (v5p-64 is 2x4x4, 32 chips) and chips for v5e and v6e (v6e-64 is 8x8). Ask `plan`
# first which slice a stage fits. Edit VERSION where Google names another runtime for the type.
set -euo pipefail

: "${NAME:?a name for the slice: NAME=infimed}"
: "${ZONE:?a zone that has the type: ZONE=us-east5-a}"
: "${TYPE:?its size: TYPE=v5p-64}"
case $TYPE in
  v5p-*) default=v2-alpha-tpuv5 ;;
  v6e-*) default=v2-alpha-tpuv6e ;;
  v5litepod-*) default=v2-alpha-tpuv5-lite ;;
  *) default= ;;
esac
VERSION=${VERSION:-$default}
: "${VERSION:?the runtime version of $TYPE: VERSION=...}"

root=$(cd "$(dirname "$0")/../.." && pwd)
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD

# Spot slices cost less, and are taken away with a SIGTERM, upon which a run saves: add --spot.
gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION"
gcloud compute tpus tpu-vm scp "$archive" "$NAME":infimed-jax.tar.gz --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  set -e
  mkdir -p infimed-jax && tar -xzf infimed-jax.tar.gz -C infimed-jax && cd infimed-jax
  python=python3
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then # Ubuntu 22.04's own is 3.10
    sudo apt-get update -qq && sudo apt-get install -y -qq python3.11-venv
    python=python3.11
  fi
  \$python -m venv .venv
  .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'
  .venv/bin/python launch/run.py doctor --platform tpu"
