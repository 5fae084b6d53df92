#!/usr/bin/env bash
# All that needs a GPU, on one: the tests that wait for one, then the benchmarks for cuda. Results go to
# benchmarks/results/<device>-<date>/ with CSV, tables and pictures. In an environment with the package and its extra [test].
#
#   bash benchmarks/gpu.sh            # everything
#   bash benchmarks/gpu.sh tests      # or some of: tests attention memory eager models autotune
set -euo pipefail
cd "$(dirname "$0")/.."
device=$(python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-').lower())")
results="benchmarks/results/$device-$(date +%F)"
failed=0
[ $# -gt 0 ] || set -- tests attention memory eager models autotune
for part in "$@"; do
  case $part in
    tests)
      python -m pytest -n 0 -m gpu || failed=1
      python -m pytest -n 0 tests/ops/test_triton.py -m "not gpu" || failed=1
      python -m tests.ops.random_calls --device cuda --calls 2000 --backends auto triton sdpa math || failed=1 ;;
    attention)
      python -m benchmarks.attention --device cuda --dtype bfloat16 --output "$results/attention"
      python -m benchmarks.attention --device cuda --dtype bfloat16 --cold-cache --output "$results/cold" ;;
    memory)
      python -m benchmarks.memory --device cuda --dtype bfloat16 --output "$results/memory" ;;
    eager)  # with the time that Python takes to launch
      python -m benchmarks.attention --device cuda --dtype bfloat16 --eager --output "$results/eager" ;;
    models)
      python -m benchmarks.models --device cuda --dtype bfloat16 --output "$results/models" ;;
    autotune)  # with triton_autotune, and FlexAttention at its best: PyTorch times its tiles too, minutes a case
      python -m benchmarks.attention --device cuda --dtype bfloat16 --autotune --output "$results/autotuned" ;;
    *)
      echo "parts are tests, attention, memory, eager, models and autotune: got $part" >&2
      exit 2 ;;
  esac
done
echo "results: $results"
exit "$failed"
