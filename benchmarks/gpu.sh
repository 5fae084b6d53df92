#!/usr/bin/env bash
# What needs a GPU, on one, meant for 10 minutes: the tests that wait for one, then the benchmarks for cuda. Results go to
# benchmarks/results/<device>-<date>/ with CSV and tables: send that folder. In an environment with the package and its
# extra [test].
#
#   bash benchmarks/gpu.sh                         # tests attention eager memory models
#   bash benchmarks/gpu.sh attention schedules     # or some of these and: cold schedules autotune
set -euo pipefail
cd "$(dirname "$0")/.."
device=$(python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-').lower())")
results="benchmarks/results/$device-$(date +%F)"
failed=0
[ $# -gt 0 ] || set -- tests attention eager memory models
for part in "$@"; do
  echo "== $part, $(date +%T)"
  case $part in
    tests)
      python -m pytest -m gpu tests/ops tests/examples/test_ablation.py || failed=1
      python -m pytest tests/ops/test_triton*.py -m "not gpu and not slow" || failed=1
      python -m tests.ops.random_calls --device cuda --calls 100 --backends auto triton sdpa math || failed=1 ;;
    attention) # the GPU's time alone
      python -m benchmarks.attention --device cuda --dtype bfloat16 --output "$results/attention" ;;
    eager) # with the time that Python takes to launch
      python -m benchmarks.attention --device cuda --dtype bfloat16 --eager --no-compile --output "$results/eager" ;;
    memory)
      python -m benchmarks.memory --device cuda --dtype bfloat16 --output "$results/memory" ;;
    models)
      python -m benchmarks.models --device cuda --dtype bfloat16 --output "$results/models" ;;
    cold) # with the L2 cache emptied before each call
      python -m benchmarks.attention --device cuda --dtype bfloat16 --cold-cache --no-compile --output "$results/cold" ;;
    schedules) # how the kernels can be cut, each timed: what the table in ops/triton/schedule.py is chosen from
      python -m benchmarks.schedules --output "$results/schedules" ;;
    autotune) # with triton_autotune, and FlexAttention at its best: PyTorch times its tiles too, minutes a case
      python -m benchmarks.attention --device cuda --dtype bfloat16 --autotune --output "$results/autotuned" ;;
    *)
      echo "parts are tests, attention, eager, memory, models, cold, schedules and autotune: got $part" >&2
      exit 2 ;;
  esac
done
echo "results: $results, $(date +%T)"
exit "$failed"
