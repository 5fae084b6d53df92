"""Backend `math`: the softmax written out, the reference that all other backends are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.ops.inputs import Inputs, total_mask
from spatial_decay.precision import at_least_float32, autocast_disabled

__all__ = ["attention", "unsupported_reasons", "weights"]


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It runs everything: any device, any dtype, forward-mode and second derivatives."""
    return []


def weights(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M), (B, N, L, L), float32 at least; a row that may attend to nothing is zero."""
    with autocast_disabled(inputs.q.device):
        q, k = at_least_float32(inputs.q), at_least_float32(inputs.k)
        mask, is_empty = total_mask(inputs, dtype=q.dtype)
        scores = (q * inputs.scale) @ k.transpose(-2, -1)
        probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return probabilities if is_empty is None else probabilities.masked_fill(is_empty, 0.0)


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in float32 at least inside, in the dtype of v outside."""
    probabilities = F.dropout(weights(inputs), inputs.dropout_p)
    with autocast_disabled(inputs.v.device):
        return (probabilities @ at_least_float32(inputs.v)).to(inputs.v.dtype)
