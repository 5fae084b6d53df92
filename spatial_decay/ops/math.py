"""Backend `math`: the softmax written out, the reference that all other backends are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.ops.inputs import Inputs, total_mask
from spatial_decay.precision import at_least_float32, autocast_disabled

__all__ = ["attention", "avoid_reasons", "avoid_reasons_on_small_inputs", "unsupported_reasons", "weights"]

# Scores of all sequences, B * N * L * L, up to which it is the fastest on the CPU. By 2 threads: alone, blocks
# pay from 2 to 4 million on; within a model, where others use the cache in between, from half a million.
_SMALL = 1 << 19
# Training, blocks of shorter sequences are never faster.
_SHORTEST_IN_BLOCKS = 32


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It runs everything: any device, any dtype, forward-mode and second derivatives."""
    return []


def avoid_reasons(inputs: Inputs) -> list[str]:
    """None: it is what the choice comes to when all others are worse."""
    return []


def avoid_reasons_on_small_inputs(inputs: Inputs) -> list[str]:
    """On the CPU, uncompiled: why any other backend is not worth its calls."""
    if inputs.needs_grad and inputs.length < _SHORTEST_IN_BLOCKS:
        return [f"training, sequences shorter than {_SHORTEST_IN_BLOCKS} are faster written out (math)"]
    if inputs.num_scores > _SMALL:
        return []
    return [
        f"{inputs.num_scores / 1e6:.2g} million scores are faster written out (math), up to {_SMALL / 1e6:.2g} million"
    ]


def weights(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M), (B, N, L, L), float32 at least; a row that may attend to nothing is zero."""
    with autocast_disabled(inputs.q.device):
        q, k = (at_least_float32(x.flatten(0, -4)) for x in (inputs.q, inputs.k))
        mask, is_empty = total_mask(inputs, dtype=q.dtype)
        scores = (q * inputs.scale) @ k.transpose(-2, -1)
        probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        return probabilities if is_empty is None else probabilities.masked_fill(is_empty, 0.0)


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in float32 at least inside, in the dtype of v outside."""
    probabilities = F.dropout(weights(inputs), inputs.dropout_p)
    with autocast_disabled(inputs.v.device):
        return (probabilities @ at_least_float32(inputs.v.flatten(0, -4))).to(inputs.v.dtype)
