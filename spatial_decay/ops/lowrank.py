"""Backend `lowrank`: a decay that is a product of a few channels (SquaredDecay), through attention without a mask.

    scale * Q K^T + M = scale * [Q, C_q / scale] [K, C_k]^T,    M = C_q C_k^T

The channels are appended to q and k, and F.scaled_dot_product_attention does the rest by its kernels without a mask,
its gradients too. So does whatever a program is exported to. What costs: 8 channels more in both products, for v is
padded to the same width, which PyTorch's flash kernels want; and three copies.

Terms of M cancel, and what float32 rounds of them is some 1e-7 * strength * (largest distance)^2: docs/performance/
backends.md has the errors beside the mask's. Half precision cannot hold the terms. So each channel goes in as a high
and a low part there. The output is then as exact as with a mask. The gate's gradient is not, because the kernel rounds
the gradient of each channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.ops import sdpa
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.math import avoid_reasons_on_small_inputs

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_MULTIPLE = 8  # of head_dim, without which kernels copy q, k and v once more, or refuse
_WIDE = 64  # rows or columns, up to which "auto" takes it: rounding grows with the square of the distance


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs a decay that has channels, a scale by which these can be divided, and what `sdpa` needs."""
    decay, reasons = inputs.decay, []
    if decay is None or not decay.has_channels:
        what = "no decay" if decay is None else type(decay).__name__
        reasons.append(f"{what} (needs a decay with channels, as SquaredDecay is)")
    if inputs.scale == 0:
        reasons.append("scale=0 (needs another: what is added is divided by it)")
    return reasons + sdpa.unsupported_reasons(_without_decay(inputs, inputs.q, inputs.k, inputs.v))


def avoid_reasons(inputs: Inputs) -> list[str]:
    """In half precision, on wide grids, beside a mask over pairs, and where `sdpa` is avoided."""
    q, mask = inputs.q, inputs.attn_mask
    if q.dtype.itemsize < 4:
        return ["half precision rounds the terms of the decay, which cancel"]
    if mask is not None and mask.shape[2] > 1:
        return ["attn_mask is over pairs: with one in memory, to add the decay to it costs less"]
    if torch.compiler.is_compiling():  # a compiler is not asked for sizes, which may vary
        return []
    layout = None if inputs.decay is None else inputs.decay.layout
    if layout is not None and layout.is_grid and layout.largest_step >= _WIDE:
        return [f"on a grid of more than {_WIDE} rows or columns the decay's terms lose digits in float32 too"]
    if q.device.type != "cpu":
        return []
    return inputs.transforms or avoid_reasons_on_small_inputs(inputs)


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), M in channels of q and k."""
    q, k, v = inputs.sequences()
    assert inputs.decay is not None
    of_queries, of_keys = inputs.decay.channels()  # (B|1, N, L, r) each
    of_queries, of_keys = _channels(of_queries / inputs.scale, of_keys, q.dtype)
    padding = -(q.shape[-1] + of_queries.shape[-1]) % _MULTIPLE
    q, k = (_beside(x, channels, padding) for x, channels in ((q, of_queries), (k, of_keys)))
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    return sdpa.attention(_without_decay(inputs, q, k, v))[..., : inputs.head_dim]


def _without_decay(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    """The rest as it is; torch 2.6 traces no dataclasses.replace."""
    return Inputs(q, k, v, None, inputs.attn_mask, inputs.dropout_p, inputs.scale)


def _beside(x: Tensor, channels: Tensor, padding: int) -> Tensor:
    """Channels of the decay behind those of x, (S, N, L, d), then zeros."""
    return torch.cat([x, F.pad(channels, (0, padding)).expand(x.shape[0], -1, -1, -1)], -1)


def _channels(of_queries: Tensor, of_keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The channels in dtype: in half precision as high and low parts, (h_q + l_q) (h_k + l_k) without l_q l_k."""
    if dtype.itemsize >= 4:
        return of_queries.to(dtype), of_keys.to(dtype)
    high_q, low_q = _parts(of_queries, dtype)
    high_k, low_k = _parts(of_keys, dtype)
    return torch.cat([high_q, high_q, low_q], -1), torch.cat([high_k, low_k, high_k], -1)


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the sum of two numbers of dtype; the low part is a constant: the gradient of the high one is all of it."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).detach().to(dtype)
