"""Backend `native`: a compiled kernel for CPUs, forward and backward, and what it can run (SDT Eq. 10).

    O = softmax(scale * Q K^T + M) V

operators.py has the operators of torch.library, call.py what one call hands to the kernel, ops/formulas.py which decays
it knows, and source/ has the mathematics, in C++. library.py finds the compiled kernel, build.py makes it.
Memory beyond inputs, outputs and their gradients is two numbers a token and head, and for each thread some sequences'
features. Results repeat bit for bit for a number of threads. No second derivatives, no torch.func transforms.
"""

import math

import torch
from torch import Tensor

from spatial_decay.decay import GaussianDecay
from spatial_decay.layout import Grid
from spatial_decay.ops.attn_mask import tops_of
from spatial_decay.ops.formulas import FORMULAS, formula_of, position_table, reasons_of_decay
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.native import library, operators
from spatial_decay.ops.native.call import DTYPES, MAX_HEAD_DIM

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

# Scores of all sequences, B * N * L * L, from which a call costs little beside F.scaled_dot_product_attention's work.
_LARGE = 1 << 18


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs its compiled kernel, the CPU, float32 or half precision, and a decay that it knows."""
    q = inputs.q
    reasons = reasons_of_decay(inputs.decay)
    if q.device.type != "cpu":
        reasons.append(f"q is on {q.device.type} (needs cpu)")
    if q.dtype not in DTYPES:
        reasons.append(f"{q.dtype} (needs float32, bfloat16 or float16)")
    if not 1 <= inputs.head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head_dim={inputs.head_dim} (needs 1 to {MAX_HEAD_DIM})")
    reasons += inputs.shared_reasons()
    if (reason := library.reason()) is not None:
        reasons.append(reason)
    return reasons


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Where the program is to leave Python; and where nothing is added to the scores, unless it pays there too."""
    if inputs.is_exporting:
        return ["torch.export: the program would need this package"]
    if inputs.decay is None and inputs.attn_mask is None and not _beats_plain_attention(inputs):
        return ["without a decay or a mask PyTorch's own kernel is as fast"]
    return []


def _beats_plain_attention(inputs: Inputs) -> bool:
    """By 5 to 25 percent in float32, 13 to 46 in half precision. A compiler is not asked for sizes, which may vary."""
    return not torch.compiler.is_compiling() and inputs.num_scores >= _LARGE


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in float32 inside, in the dtype and shape of q outside."""
    q, decay, mask = inputs.q, inputs.decay, inputs.attn_mask
    formula = formula_of(decay)
    assert formula is not None  # else there is a reason
    positions, grid = None, [1, inputs.length, 0]
    if decay is None:
        numbers = q.new_empty((0, 1, *q.shape[-3:-1]), dtype=torch.float32)
    else:
        numbers = FORMULAS[formula].lowered(tuple(x.to(torch.float32) for x in decay.numbers))
        if isinstance(decay.layout, Grid):
            grid = [*decay.layout.size, decay.layout.num_prefix_tokens]
        else:
            positions = position_table(decay.layout, formula, q.device)
    max_step = decay.max_distance if isinstance(decay, GaussianDecay) else math.inf
    tops = None if mask is None or mask.dtype == torch.bool else tops_of(mask)[0].squeeze(-1).to(torch.float32)
    return operators.attend(
        q, inputs.k, inputs.v, formula, numbers, mask, tops, positions, grid, inputs.scale, max_step
    )
