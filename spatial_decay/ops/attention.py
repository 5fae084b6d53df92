"""The public door of attention with decay (SDT Eq. 10, 12): checks, the choice of a backend, the axial arrangement."""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay, PairwiseDecay
from spatial_decay.grid import Grid, columns_of_rows, from_columns, to_columns, to_rows
from spatial_decay.ops import math, sdpa
from spatial_decay.ops.attn_mask import as_float_mask, columns_of_mask, rows_of_mask
from spatial_decay.precision import autocast_dtype

__all__ = ["BACKENDS", "Backend", "attention_weights", "check_backend", "decay_attention"]


class Backend(Protocol):
    """What a file of a backend offers."""

    def unsupported_reasons(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: PairwiseDecay | None,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
    ) -> list[str]: ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: PairwiseDecay | None,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        scale: float,
    ) -> Tensor: ...


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "math": math}
"""In order of preference: "auto" takes the first that has no reason against the inputs. The last runs everything."""


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Decay | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention with an additive decay.

    O = softmax(scale * Q K^T + M) V                 (Mao et al. 2025, Eq. 10)

    With an AxialDecay, twice: over each row, then over each column of the result (Eq. 12).

    Forward-mode and second derivatives need backend="math": F.scaled_dot_product_attention has neither.

    Args:
        q: Queries, (B, N, L, d), floating point.
        k: Keys, same shape, dtype and device as q.
        v: Values, same shape, dtype and device as q.
        bias: What is added to the scores, in nats: a ManhattanDecay, PathDecay or AxialDecay. None: nothing.
        attn_mask: Added to the decay: bool (True = may attend) or floating point, broadcastable to (B, N, L, L).
            A query that may attend to nothing gets zeros. An AxialDecay uses the pairs that share a row, then those
            that share a column.
        dropout_p: Probability of dropping an attention weight, 0 <= dropout_p < 1. It always applies: pass 0 when
            not training.
        scale: Multiplies Q K^T. None means d ** -0.5.
        backend: "auto", or the name of one backend: "sdpa" or "math".

    Returns:
        (B, N, L, d), dtype of q; under autocast, its dtype.

    Raises:
        TypeError: q, k, v or attn_mask have a dtype that cannot be used.
        ValueError: shapes, dtypes, devices or grid disagree; the backend is unknown; dropout_p is out of range.
        NotImplementedError: the named backend cannot run these inputs.

    Example:
        >>> strength = torch.full((2, 4, 49), -0.05)
        >>> q, k, v = torch.randn(3, 2, 4, 49, 16)
        >>> decay_attention(q, k, v, ManhattanDecay(strength, Grid(7, 7))).shape
        torch.Size([2, 4, 49, 16])
    """
    q, k, v = _as_autocast(q, k, v)
    _check_inputs(q, k, v)
    _check_bias(q, bias)
    check_backend(backend)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must satisfy 0 <= dropout_p < 1: got {dropout_p}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else as_float_mask(attn_mask, q)

    attend = partial(_attend, backend=backend, dropout_p=dropout_p, scale=scale)
    if not isinstance(bias, AxialDecay):
        return attend(q, k, v, bias, mask)
    grid = bias.grid
    mask_w, mask_h = _axis_masks(mask, q.shape[0], grid)
    v = attend(to_rows(q, grid), to_rows(k, grid), to_rows(v, grid), bias.rows, mask_w)  # (B*H, N, W, d)
    v = attend(to_columns(q, grid), to_columns(k, grid), columns_of_rows(v, grid), bias.columns, mask_h)
    return from_columns(v, grid)


def attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Decay | None = None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """How much each query takes of each token: the weights that decay_attention gives the values.

    Args:
        q: Queries, (B, N, L, d), floating point.
        k: Keys, same shape, dtype and device as q.
        bias: As in decay_attention. An AxialDecay's two softmaxes become the one matrix that they multiply to.
        attn_mask: As in decay_attention.
        scale: As in decay_attention.

    Returns:
        (B, N, L, L), float32 at least. Rows add up to 1; the row of a query that may attend to nothing is zero.

    Raises:
        TypeError, ValueError: as in decay_attention.
    """
    q, k = _as_autocast(q, k)
    _check_inputs(q, k, k)
    _check_bias(q, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else as_float_mask(attn_mask, q)
    if not isinstance(bias, AxialDecay):
        return math.weights(q, k, bias, attn_mask=mask, scale=scale)
    grid, batch_size = bias.grid, q.shape[0]
    mask_w, mask_h = _axis_masks(mask, batch_size, grid)
    rows = math.weights(to_rows(q, grid), to_rows(k, grid), bias.rows, attn_mask=mask_w, scale=scale)
    columns = math.weights(to_columns(q, grid), to_columns(k, grid), bias.columns, attn_mask=mask_h, scale=scale)
    rows = rows.unflatten(0, (batch_size, grid.height))  # (B, H, N, W, W)
    columns = columns.unflatten(0, (batch_size, grid.width))  # (B, W, N, H, H)
    # From query (h, w) down its column to (g, w), then along row g to (g, u).
    together = torch.einsum("b w n h g, b g n w u -> b n h w g u", columns, rows)
    return together.flatten(4, 5).flatten(2, 3)


def _axis_masks(attn_mask: Tensor | None, batch_size: int, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
    if attn_mask is None:
        return None, None
    return rows_of_mask(attn_mask, batch_size, grid), columns_of_mask(attn_mask, batch_size, grid)


def check_backend(backend: str) -> None:
    """Raise ValueError where no backend has this name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}: got {backend!r}.")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: PairwiseDecay | None,
    attn_mask: Tensor | None,
    *,
    backend: str,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """Choose a backend for these inputs and run it; a named one runs or says all its reasons."""
    # No nested function here: dynamo before torch 2.7 does not trace one whose annotations hold a union.
    reasons = {
        name: candidate.unsupported_reasons(q, k, v, bias, attn_mask=attn_mask, dropout_p=dropout_p)
        for name, candidate in BACKENDS.items()
    }
    able = [name for name in BACKENDS if not reasons[name]]
    chosen = able[0] if backend == "auto" else backend
    if chosen not in able:
        raise NotImplementedError(
            f"backend={backend!r} cannot run these inputs:\n"
            + "".join(f"  - {reason}\n" for reason in reasons[chosen])
            + f"Use backend='auto' or one of: {', '.join(able)}."
        )
    return BACKENDS[chosen].attention(q, k, v, bias, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, inputs come down to its dtype, as for F.scaled_dot_product_attention; the decay does not."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.is_floating_point():
        raise TypeError(
            f"q, k and v must be floating point: got {q.dtype}. Convert them first, for instance q.float()."
        )
    if q.ndim != 4:
        raise ValueError(f"q must be (B, N, L, d): got shape {tuple(q.shape)}. Split the heads and add the batch.")
    for name, x in (("k", k), ("v", v)):
        for what in ("shape", "dtype", "device"):
            wanted, got = getattr(q, what), getattr(x, what)
            if wanted != got:
                raise ValueError(
                    f"q, k and v must have the same {what}: got q {_readable(wanted)} and {name} {_readable(got)}. "
                    "Attention with decay is self-attention; convert or move the odd one."
                )


def _check_bias(q: Tensor, bias: Decay | None) -> None:
    if bias is None:
        return
    if not isinstance(bias, (PairwiseDecay, AxialDecay)):
        raise TypeError(
            f"bias must be a decay, for instance a ManhattanDecay, or None: got {type(bias).__name__}. "
            "Pass a mask that is a tensor as attn_mask."
        )
    batch_size, num_heads, num_tokens, _ = q.shape
    if bias.grid.num_tokens != num_tokens:
        raise ValueError(
            f"the grid of the bias must have the L tokens of q: got {bias.grid} with {bias.grid.num_tokens} tokens, "
            f"and L = {num_tokens}. Build the bias for the grid of this call."
        )
    if isinstance(bias, AxialDecay):
        height, width = bias.grid.size
        _check_tokens("bias.rows", bias.rows, (batch_size * height, num_heads, width), q.device)
        _check_tokens("bias.columns", bias.columns, (batch_size * width, num_heads, height), q.device)
    else:
        _check_tokens("bias", bias, (batch_size, num_heads, num_tokens), q.device)


def _check_tokens(name: str, bias: PairwiseDecay, shape: tuple[int, int, int], device: torch.device) -> None:
    for token in bias.tokens:
        if tuple(token.shape) not in (shape, (1, *shape[1:])):
            raise ValueError(
                f"the tensors of {name} must have shape {shape}, or 1 in place of {shape[0]}: got "
                f"{tuple(token.shape)}. They belong to the images, heads and tokens of q."
            )
        if token.device != device:
            raise ValueError(f"{name} must be on the device of q: got {token.device} and {device}. Move one.")


def _readable(value: object) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
