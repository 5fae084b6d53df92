"""The one Triton kernel that is launched, with the one list of arguments: softmax(scale * Q K^T + M) V, step by step.

long.py has the steps for sequences of any length, short.py those for short ones; pairs.py and tiles.py what both share.
"""

from typing import Any

import triton
import triton.language as tl

from spatial_decay.ops.triton.kernels import long, short
from spatial_decay.ops.triton.kernels.tiles import Call, Constants

__all__ = ["attention"]


def _name(specialization: Any) -> str:
    """In a profile."""
    return f"attention_{specialization.constants['STEP'].replace(' ', '_')}"


@triton.jit(repr=_name)
def attention(
    features, rows, numbers, key_mask, positions, num_outer, num_heads, length, scale, factor,
    STEP: tl.constexpr, FORMULA: tl.constexpr, NUM_NUMBERS: tl.constexpr, READS_KEYS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_FLAGS: tl.constexpr, NUM_PREFIX: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REST_BLOCK: tl.constexpr,
    UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program of a step; what the arguments are stands in Call and Constants."""
    # As an argument, because what is assigned to a variable is no constant any more.
    _run(
        STEP,
        Call(features, rows, numbers, key_mask, positions, num_outer, num_heads, length, scale, factor),
        Constants(
            FORMULA, NUM_NUMBERS, READS_KEYS, HAS_KEY_MASK, HAS_FLAGS, NUM_PREFIX, D, D1, D2, BLOCK_Q, BLOCK_K,
            REST_BLOCK, UNIT, UPCAST,
        ),
    )  # fmt: skip


@triton.jit
def _run(STEP: tl.constexpr, call, const):
    if STEP == "forward":
        long.forward(call, const)
    elif STEP == "backward rows":
        long.backward_rows(call, const)
    elif STEP == "backward columns":
        long.backward_columns(call, const)
    elif STEP == "short forward":
        short.forward(call, const)
    else:
        short.backward(call, const)
