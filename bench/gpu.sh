#!/bin/bash
# bench/gpu.sh OUT.jsonl : everything that needs a GPU, in under 8 minutes on one: the CUDA tests, bench.pack, and a
# training run of gpt2-100m in each precision. Apex is used where it can be imported. Exits with 1 if anything is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT.jsonl}")
mkdir -p "$(dirname "$out")"
status=0
python=${PYTHON:-python}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU" >&2; exit 1; }
"$python" -c 'from commlab import native; print(native.backend()); print(native.cuda_backend())'

echo "==== tests"
timeout 120 "$python" -m pytest -q -p no:cacheprovider tests/native/test_cuda.py tests/gradients/test_mirror.py -k "OnGpu" || status=1

echo "==== pack"
timeout 150 "$python" -m bench.pack --device cuda --json "$out" || status=1

echo "==== gpt2-100m in every precision"
timeout 240 "$python" -m bench.precision --ranks 1 --strategies single --precisions fp32 bf16 fp16 apex --steps 30 \
  --autocast auto --limit 60 --train device cuda model gpt2-100m batch-size 8 eval-batches 1 --json "$out" || status=1
if command -v mpirun >/dev/null; then
  echo "==== ranks that share a GPU, through the window and through gloo"
  timeout 120 "$python" -m bench.precision --ranks 4 --strategies dps allreduce ddp --precisions fp16 --steps 10 \
    --limit 60 --train device cuda model gpt2-100m batch-size 8 eval-batches 1 --json "$out" || status=1
fi
exit $status
