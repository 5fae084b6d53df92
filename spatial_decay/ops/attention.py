"""The public door of attention with decay (SDT Eq. 10, 12): the choice of a backend, and rows, then columns."""

from typing import Protocol

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay
from spatial_decay.grid import from_columns, to_rows
from spatial_decay.ops import math, sdpa, tiled
from spatial_decay.ops.inputs import Inputs, along_columns, along_rows, checked_inputs

__all__ = ["BACKENDS", "Backend", "attention_weights", "check_backend", "decay_attention"]


class Backend(Protocol):
    """What a file of a backend offers."""

    def unsupported_reasons(self, inputs: Inputs) -> list[str]:
        """Why these inputs cannot run there; empty where they can."""

    def attention(self, inputs: Inputs) -> Tensor:
        """softmax(scale * Q K^T + M) V, (B, N, L, d) in the dtype of v."""


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "math": math, "tiled": tiled}
"""In order of preference: "auto" takes the first that has no reason against the inputs. `math` runs everything, so what
stands behind it is taken by name only."""


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
        backend: "auto", or the name of one backend: "sdpa" (the mask in memory), "math" (written out) or "tiled"
            (by blocks, without the mask in memory; never chosen by "auto").

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
    check_backend(backend)
    inputs = checked_inputs(q, k, v, bias, attn_mask, dropout_p, scale)
    if not isinstance(bias, AxialDecay):
        return _attend(inputs, backend)
    v_rows = _attend(along_rows(inputs, bias), backend)  # (B*H, N, W, d)
    return from_columns(_attend(along_columns(inputs, bias, v_rows), backend), bias.grid)


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
    inputs = checked_inputs(q, k, k, bias, attn_mask, 0.0, scale)
    if not isinstance(bias, AxialDecay):
        return math.weights(inputs)
    rows = math.weights(along_rows(inputs, bias)).unflatten(0, (-1, bias.grid.height))  # (B, H, N, W, W)
    v_rows = to_rows(k, bias.grid)  # not looked at
    columns = math.weights(along_columns(inputs, bias, v_rows)).unflatten(0, (-1, bias.grid.width))  # (B, W, N, H, H)
    # From query (h, w) down its column to (g, w), then along row g to (g, u).
    together = torch.einsum("b w n h g, b g n w u -> b n h w g u", columns, rows)
    return together.flatten(4, 5).flatten(2, 3)


def check_backend(backend: str) -> None:
    """Raise ValueError where no backend has this name."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}: got {backend!r}.")


def _attend(inputs: Inputs, backend: str) -> Tensor:
    """Choose a backend for these inputs and run it; a named one runs or says all its reasons."""
    reasons = {name: candidate.unsupported_reasons(inputs) for name, candidate in BACKENDS.items()}
    able = [name for name in BACKENDS if not reasons[name]]
    chosen = able[0] if backend == "auto" else backend
    if chosen not in able:
        raise NotImplementedError(
            f"backend={backend!r} cannot run these inputs:\n"
            + "".join(f"  - {reason}\n" for reason in reasons[chosen])
            + f"Use backend='auto' or one of: {', '.join(able)}."
        )
    return BACKENDS[chosen].attention(inputs)
