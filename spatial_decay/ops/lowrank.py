"""Backend `lowrank`: a decay that is a product of a few channels (SquaredDecay), through attention without a mask.

    scale * Q K^T + M = scale * [Q, C_q / scale] [K, C_k]^T,    M = C_q C_k^T

The channels are appended to q and k, and F.scaled_dot_product_attention does the rest by its kernels without a mask,
its gradients too. So does whatever a program is exported to. What costs: 8 channels more in both products, for v is
padded to the same width, which PyTorch's flash kernels want; and three copies.

Terms of M cancel, and what is left has the rounding of the largest, some strength * (half the extent)^2 nats. More than
half of the dtype's digits is a reason; "auto" allows far less, see _FEW. docs/performance/backends.md has the errors
beside the mask's. Half precision cannot hold the terms: there each channel goes in as a high and a low part, after a
power of two has moved between its two sides. The output is then exact to the dtype's digits. The gate's gradient is
not, because the kernel rounds the gradient of each channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.layout import Grid, Layout
from spatial_decay.ops import sdpa
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.math import avoid_reasons_on_small_inputs
from spatial_decay.values import are_readable

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_MULTIPLE = 8  # of head_dim, without which kernels copy q, k and v once more, or refuse
_LEAST_SCALE = 2.0**-20  # float16 holds the two sides of a channel that was divided by it, up to 2 ** 16
# Nats that "auto" lets rounding take of the largest term; in float32 terms of 64. Measured at these, from 14 x 14 to
# 56 x 56 with and without a class token: the output's error is at most 5e-6, that of the gate's gradient 3e-5.
_FEW = 2.0**-17
_WIDE = 64  # rows or columns, up to which terms count as small where they cannot be read


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs a decay with channels, whose terms the dtype holds, a scale to divide by, and what `sdpa` needs."""
    decay, reasons = inputs.decay, []
    if decay is None or not decay.has_channels:
        what = "no decay" if decay is None else type(decay).__name__
        reasons.append(f"{what} (needs a decay with channels, as SquaredDecay is)")
    elif (terms := _largest_term(inputs) or 0.0) > (limit := _rounding(inputs) ** -0.5):
        reasons.append(
            f"the decay is a sum of terms of up to {terms:.3g} nats, of which {inputs.q.dtype} keeps less than half of "
            f"the digits (needs at most {limit:.0f}: a weaker decay, tokens closer together, or another dtype)"
        )
    if abs(inputs.scale) < _LEAST_SCALE:
        reasons.append(f"scale={inputs.scale} (needs one of at least 2 ** -20: what is added is divided by it)")
    return reasons + (
        inputs.forward_mode or sdpa.unsupported_reasons(_without_decay(inputs, inputs.q, inputs.k, inputs.v))
    )


def avoid_reasons(inputs: Inputs) -> list[str]:
    """In half precision, beside a mask over pairs, where `sdpa` is avoided, and where terms of the decay are large."""
    q, mask = inputs.q, inputs.attn_mask
    if q.dtype.itemsize < 4:
        return ["half precision rounds the terms of the decay, which cancel"]
    if mask is not None and mask.shape[2] > 1:
        return ["attn_mask is over pairs: with one in memory, to add the decay to it costs less"]
    reasons = []
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        reasons = inputs.transforms or avoid_reasons_on_small_inputs(inputs)
    return reasons or _reasons_of_terms(inputs)


def _reasons_of_terms(inputs: Inputs) -> list[str]:
    """Where the decay's terms lose digits that a mask keeps; or may lose them, where they cannot be read."""
    decay = inputs.decay
    if decay is None or not decay.has_channels:
        return []
    terms, limit = _largest_term(inputs), _FEW / _rounding(inputs)
    if terms is None:
        return _reasons_of_extent(inputs, decay.layout)
    large = f"terms of {terms:.3g} nats cancel in the decay, and their rounding stays: little up to {limit:.0f}"
    return [large] if terms > limit else []


def _reasons_of_extent(inputs: Inputs, layout: Layout) -> list[str]:
    """In place of the terms, which grow with its square; not of what torch.export traces, a program for all sizes."""
    if _rounding(inputs) < torch.finfo(torch.float32).eps:
        return []
    if not isinstance(layout, Grid):
        return ["the extent of Positions is not known, and the decay's terms grow with its square"]
    if not inputs.is_exporting and any(size > _WIDE for size in layout.size):
        return [f"on a grid of more than {_WIDE} rows or columns the decay's terms may lose digits"]
    return []


def _largest_term(inputs: Inputs) -> float | None:
    """Of those that cancel to the decay, in nats; None where the values cannot be read."""
    assert inputs.decay is not None
    if not are_readable(*inputs.of_decay) or not inputs.q.numel():
        return None
    with torch.no_grad():
        return inputs.decay.largest_term().item()


def _rounding(inputs: Inputs) -> float:
    """What a product of channels loses, relative to it: they are made of the decay's numbers, in float32 at least.

    High and low parts have twice the digits of half precision.
    """
    assert inputs.decay is not None
    dtype = inputs.q.dtype
    of_numbers = torch.promote_types(inputs.decay.numbers[0].dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    return max(eps if dtype.itemsize >= 4 else eps**2, torch.finfo(of_numbers).eps)


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
    balance = _balance(of_queries, of_keys)
    high_q, low_q = _parts(of_queries * balance, dtype)
    high_k, low_k = _parts(of_keys / balance, dtype)
    return torch.cat([high_q, high_q, low_q], -1), torch.cat([high_k, low_k, high_k], -1)


def _balance(of_queries: Tensor, of_keys: Tensor) -> Tensor:
    """The power of two that makes both sides of a channel about as large, (B|1, N, 1, r): so float16 holds both.

    Less than 2 ** -40 counts as that: beside zeros, which have a gradient, the other side stays a number too.
    """
    # The largest of each channel; along L as it lies that takes ten times as long.
    largest_q, largest_k = (x.detach().mT.contiguous().abs().amax(-1) for x in (of_queries, of_keys))  # (B|1, N, r)
    exponents = [x.clamp(min=2.0**-40).log2() for x in (largest_q, largest_k)]
    return ((exponents[1] - exponents[0]) / 2).round().exp2()[:, :, None]


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the sum of two numbers of dtype; the low part is a constant: the gradient of the high one is all of it."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).detach().to(dtype)
