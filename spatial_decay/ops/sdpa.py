"""Backend `sdpa`: F.scaled_dot_product_attention with the decay as attn_mask, the path that runs CUDA's kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spatial_decay.ops.inputs import Inputs, total_mask
from spatial_decay.ops.math import avoid_reasons_on_small_inputs
from spatial_decay.values import are_readable

__all__ = ["attention", "avoid_reasons", "row_multiple", "unsupported_reasons"]


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """Forward mode has no rule; on CUDA, something else than the mask must require a gradient."""
    reasons = inputs.forward_mode
    q, k, v = inputs.q, inputs.k, inputs.v
    masks = inputs.of_decay + (() if inputs.attn_mask is None else (inputs.attn_mask,))
    mask_needs_grad = torch.is_grad_enabled() and any(mask.requires_grad for mask in masks)
    if q.is_cuda and mask_needs_grad and not any(x.requires_grad for x in (q, k, v)):
        # The kernel reads a log-sum-exp that the forward did not save (PyTorch issue 148476).
        reasons.append("on cuda, only the decay requires grad (needs q, k or v to require grad too)")
    return reasons


def avoid_reasons(inputs: Inputs) -> list[str]:
    """On the CPU, uncompiled: the softmax written out costs less than small masks, and knows all transforms."""
    if inputs.q.device.type != "cpu" or torch.compiler.is_compiling():
        return []
    if transforms := inputs.transforms:
        return transforms
    if inputs.decay is None and inputs.attn_mask is None:
        return []
    return avoid_reasons_on_small_inputs(inputs)


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10) with M in memory, (B, N, L, L) in the dtype of q."""
    q, k, v = inputs.sequences()
    # An exported program is for all sizes; whether one needs padding would be a condition on it.
    multiple = 1 if inputs.is_exporting else row_multiple(q.device)
    if _can_take_the_mask_as_it_is(inputs):
        mask, is_empty = inputs.attn_mask, None
    else:
        mask, is_empty = total_mask(inputs, dtype=q.dtype, row_multiple=multiple)
    with _kernels_for_masks(q) if mask is not None else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=inputs.dropout_p, scale=inputs.scale)
    if inputs.is_exporting:
        # Each kernel has its own strides: torch.onnx.export traces twice, and would not find those of the first time.
        out = out.clone(memory_format=torch.contiguous_format)
    return out if is_empty is None else out.masked_fill(is_empty, 0.0)


# Beside scores of at most so much a value that forbids is so far below what a row allows that its exponential is 0.
_LARGEST_SCORE = 1e4


def _can_take_the_mask_as_it_is(inputs: Inputs) -> bool:
    """A mask over pairs, without a decay, of which PyTorch makes the same as of added_by, at the price of reading it.

    Each row has something to attend to, its largest value is small, and so are the scores: whatever PyTorch takes a
    forbidden value for. To judge it in a copy would take as long as the attention.
    """
    q, k, mask = inputs.q.detach(), inputs.k.detach(), inputs.attn_mask
    if inputs.decay is not None or mask is None or mask.shape[2] == 1 or not are_readable(q, k, mask):
        return False
    if mask.dtype == torch.bool:
        return q.numel() > 0 and bool(mask.any(-1).all())
    if not q.numel() or mask.dtype != q.dtype:
        return False
    lowest, highest = mask.amax(-1).aminmax()
    if not bool((lowest >= -1) & (highest <= 1)):
        return False
    longest_q, longest_k = (torch.linalg.vector_norm(x, dim=-1).max().item() for x in (q, k))
    return abs(inputs.scale) * longest_q * longest_k <= _LARGEST_SCORE


def row_multiple(device: torch.device) -> int:
    """CUDA's memory-efficient kernel wants rows of the mask 8 elements apart (16 bytes in half precision)."""
    return 8 if device.type == "cuda" else 1


def _kernels_for_masks(q: Tensor) -> AbstractContextManager[None]:
    """Flash takes no mask; cuDNN gives NaN gradients at some lengths with one (PyTorch issue 196678)."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if q.is_cuda else nullcontext()
