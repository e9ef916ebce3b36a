#!/usr/bin/env bash
# benchmarks/engine.py on one GPU: a Llama 3.2 1B shape with random weights, bf16 base, fp32 adapters, 16 and 64 clients.
#
#   benchmarks/gpu.sh [--device cuda:0] [--out FILE]
#   benchmarks/gpu.sh --device cpu --tiny          the same path where there is no GPU: a minute, and no number to keep
#
# Needs torch with CUDA, transformers and peft; fedpeft is taken from this checkout, and its two small needs (pydantic, pyyaml)
# are installed into a folder of their own where they are missing. Nothing is downloaded but those. Prints the table and
# writes benchmarks/results/gpu.json with the name of the device.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} device=cuda:0 out=benchmarks/results/gpu.json tiny=
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=${2:?--device needs a value}; shift 2 ;;
    --out) out=${2:?--out needs a value}; shift 2 ;;
    --tiny) tiny=yes; shift ;;
    *) echo "gpu.sh: $1 is not known; allowed: --device, --out, --tiny" >&2; exit 2 ;;
  esac
done

own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
export PYTHONPATH="$PWD:$own${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

for package in torch transformers peft; do
  "$python" -c "import $package" 2>/dev/null || { echo "gpu.sh: $package is not installed for $python" >&2; exit 2; }
done
"$python" -c 'import pydantic, yaml' 2>/dev/null || "$python" -m pip install --quiet --target "$own" pydantic pyyaml
"$python" - "$device" <<'PYTHON' || exit 2
import sys

import torch

try:
    torch.empty(0, device=sys.argv[1])
except (RuntimeError, AssertionError) as error:
    sys.exit(f"gpu.sh: {sys.argv[1]} cannot be used ({str(error).splitlines()[0]}); where there is no GPU: --device cpu --tiny")
PYTHON

if [ -n "$tiny" ]; then
  "$python" benchmarks/engine.py --sections llama --shape tiny --device "$device" --dtype bfloat16 --clients 4,8 --batches 2 --out "$out"
else
  "$python" benchmarks/engine.py --sections llama --shape 1b --device "$device" --dtype bfloat16 --clients 16,64 --batches 4,8 --steps 5 --repetitions 3 --out "$out"
fi
