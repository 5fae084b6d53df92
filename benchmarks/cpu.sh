#!/usr/bin/env bash
# All that a CPU is measured by, some 30 minutes on two idle cores. Results go to benchmarks/results/cpu-<date>/, the
# picture with them. In an environment with the package, its kernel, and its extras [test] and [viz].
#
#   bash benchmarks/cpu.sh            # everything
#   bash benchmarks/cpu.sh attention  # or some of: attention bfloat16 avx2 memory models dense
set -euo pipefail
cd "$(dirname "$0")/.."
results="benchmarks/results/cpu-$(date +%F)"
[ $# -gt 0 ] || set -- attention bfloat16 avx2 memory models dense
for part in "$@"; do
  case $part in
    attention)
      python -m benchmarks.attention --output "$results/attention" ;;
    bfloat16)  # by whatever both sides have for it, AMX too
      python -m benchmarks.attention --dtype bfloat16 --no-compile --output "$results/attention-bfloat16" ;;
    avx2)  # both sides as on older processors; oneDNN is what PyTorch computes bfloat16 by. The kernel that
      # FlexAttention is compiled to ends in a segmentation fault so (torch 2.15, heads of 32, lines of 28).
      export ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
      python -m benchmarks.attention --no-compile --output "$results/attention-avx2"
      python -m benchmarks.attention --dtype bfloat16 --no-compile --output "$results/attention-avx2-bfloat16"
      unset ATEN_CPU_CAPABILITY MKL_ENABLE_INSTRUCTIONS ONEDNN_MAX_CPU_ISA ;;
    memory)
      python -m benchmarks.memory --output "$results/memory" ;;
    models)
      python -m benchmarks.models --profile --output "$results/models" ;;
    dense)
      python -m benchmarks.dense --profile sdt_h_tiny --output "$results/dense" ;;
    *)
      echo "parts are attention, bfloat16, avx2, memory, models and dense: got $part" >&2
      exit 2 ;;
  esac
done
echo "results: $results"
