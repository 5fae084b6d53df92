"""Backend `math`: the softmax written out, the reference that all other backends are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.decay import PairwiseDecay
from spatial_decay.ops.attn_mask import total_mask
from spatial_decay.precision import at_least_float32, autocast_disabled

__all__ = ["attention", "unsupported_reasons", "weights"]


def unsupported_reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PairwiseDecay | None,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
) -> list[str]:
    """It runs everything: any device, any dtype, second derivatives."""
    return []


def weights(q: Tensor, k: Tensor, bias: PairwiseDecay | None, *, attn_mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * Q K^T + M), (B, N, L, L), float32 at least; a row that may attend to nothing is zero."""
    with autocast_disabled(q.device):
        q, k = at_least_float32(q), at_least_float32(k)
        mask, is_empty = total_mask(bias, attn_mask, dtype=q.dtype)
        scores = (q * scale) @ k.transpose(-2, -1)
        probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return probabilities if is_empty is None else probabilities.masked_fill(is_empty, 0.0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PairwiseDecay | None,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in float32 at least inside, in the dtype of v outside."""
    probabilities = F.dropout(weights(q, k, bias, attn_mask=attn_mask, scale=scale), dropout_p)
    with autocast_disabled(q.device):
        return (probabilities @ at_least_float32(v)).to(v.dtype)
