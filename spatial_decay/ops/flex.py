"""Backend `flex`: torch.nn.attention.flex_attention with the decay as its score_mod, compiled; no mask in memory."""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from spatial_decay.decay import score_mod
from spatial_decay.decay.base import ScoreMod
from spatial_decay.ops.attn_mask import added_by
from spatial_decay.ops.inputs import Inputs

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs float32 or half precision, no dropout, no gradient of attn_mask, and on the CPU no gradient at all."""
    reasons = []
    if inputs.q.dtype not in _DTYPES:
        reasons.append(f"{inputs.q.dtype} (needs float32, float16 or bfloat16)")
    reasons += inputs.shared_reasons()
    if inputs.q.device.type == "cpu" and inputs.needs_grad:
        reasons.append("on cpu, something requires grad (needs torch.no_grad(), or cuda)")
    if inputs.q.device.type == "cpu" and torch.compiler.is_compiling():
        reasons.append("on cpu, inside torch.compile PyTorch cannot build its kernel (needs to be outside, or cuda)")
    if inputs.q.device.type == "cpu" and inputs.head_dim in (8, 16) and inputs.length % 16 == 8:
        # Its product of queries and keys then writes 16 columns where 8 are left, over the row maxima: wrong, at
        # times NaN (CppMicroGemmFP32Vec with 8 lanes, 24 > head_dim; seen in torch 2.13 and 2.15).
        reasons.append(
            f"on cpu, {inputs.length} tokens with head_dim={inputs.head_dim}: PyTorch's kernel is wrong where a length "
            "is 8 above a multiple of 16 and head_dim is 8 or 16"
        )
    return reasons


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Always: on the CPU other backends are faster; on CUDA its gradient of the decay is not repeatable."""
    if inputs.q.device.type == "cuda":
        return ["its gradient of the decay differs in the last bits from run to run (atomic additions)"]
    return ["it is compiled for each new shape"]


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), the scores one at a time inside PyTorch's own kernel."""
    q, k, v = inputs.sequences()
    if q.device.type == "cpu":  # its kernel for CPUs asks the tensors, not whether gradients are enabled
        q, k, v = q.detach(), k.detach(), v.detach()
    return _compiled()(q, k, v, score_mod=_score_mod(inputs), scale=inputs.scale)


@cache
def _compiled() -> Callable[..., Tensor]:
    """Uncompiled, it would write out all scores, and say so in a warning.

    So fullgraph: past torch's limit of compilations it is an error, not the uncompiled one. The CPU's kernel cannot be
    compiled for sizes that vary. Imported here because it pulls in sympy.
    """
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _score_mod(inputs: Inputs) -> ScoreMod | None:
    """Decay and attn_mask as one score function."""
    add_decay = None if inputs.decay is None else score_mod(inputs.decay)
    if inputs.attn_mask is None:
        return add_decay
    mask, _ = added_by(inputs.attn_mask, torch.promote_types(inputs.q.dtype, torch.float32))
    by_image, by_head, by_query = (size > 1 for size in mask.shape[:3])

    def add_decay_and_mask(score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        if add_decay is not None:
            score = add_decay(score, batch, head, q_index, k_index)
        first = torch.zeros_like(batch)
        image, of_head, query = batch if by_image else first, head if by_head else first, q_index if by_query else first
        return score + mask[image, of_head, query, k_index]

    return add_decay_and_mask
