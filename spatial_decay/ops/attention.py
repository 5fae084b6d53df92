"""The public door of attention with decay (SDT Eq. 10, 12): rows, then columns, and a backend for each."""

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay
from spatial_decay.features import from_columns, to_rows
from spatial_decay.ops.choice import BACKENDS, Backend, check_backend, choose, explain
from spatial_decay.ops.inputs import Inputs, along_columns, along_rows, checked_inputs
from spatial_decay.ops.math import weights

__all__ = ["attention_weights", "decay_attention", "explain_backend"]


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention with an additive decay.

    O = softmax(scale * Q K^T + M) V                 (Mao et al. 2025, Eq. 10)

    With an AxialDecay, twice: over each row, then over each column of the result (Eq. 12).

    Forward-mode and second derivatives need backend="math": the others have neither.

    Args:
        q: Queries, (B, N, L, d), floating point.
        k: Keys, same shape, dtype and device as q.
        v: Values, same shape, dtype and device as q.
        decay: What is added to the scores, in nats: a ManhattanDecay, PathDecay, GaussianDecay, AxialDecay
            or one of your own. None: nothing.
        attn_mask: Added to the decay: bool (True = may attend) or floating point, broadcastable to (B, N, L, L).
            Values of at most -1e5, or of at most half of the lowest number of the mask's dtype, mean that a query may
            not attend; whatever else is finite is added as it is. A query that may attend to nothing gets zeros. An
            AxialDecay uses the pairs that share a row, then those that share a column.
        dropout_p: Probability of dropping an attention weight, 0 <= dropout_p < 1. It always applies: pass 0 when
            not training.
        scale: Multiplies Q K^T, a number. None means d ** -0.5.
        backend: "auto", the fastest that can run the inputs (explain_backend says which), or the name of one: "triton"
            (fused kernels, for CUDA), "native" (a compiled kernel, for CPUs), "lowrank" (a SquaredDecay as channels of
            q and k, without a mask), "tiled" (by blocks in PyTorch, without the mask in memory; for CPUs), "sdpa" (the
            mask in memory), "math" (written out), and, never chosen by "auto", "flex" (FlexAttention, compiled) or
            "triton_autotune" (triton with tiles timed at the first call for each shape).

    Returns:
        (B, N, L, d), dtype of q; under autocast, its dtype.

    Raises:
        TypeError: q, k, v or attn_mask have a dtype that cannot be used; scale is not a number.
        ValueError: shapes, dtypes, devices or layout disagree; the backend is unknown; dropout_p is out of range; scale
            is not finite.
        NotImplementedError: the named backend cannot run these inputs.

    Examples:
        >>> strength = torch.full((2, 4, 49), -0.05)
        >>> q, k, v = torch.randn(3, 2, 4, 49, 16)
        >>> decay_attention(q, k, v, ManhattanDecay(strength, Grid(7, 7))).shape
        torch.Size([2, 4, 49, 16])
    """
    check_backend(backend)
    inputs = checked_inputs(q, k, v, decay, attn_mask, dropout_p, scale)
    if not isinstance(decay, AxialDecay):
        return _attend(inputs, backend)
    v_rows = _attend(along_rows(inputs, decay), backend)  # (B, H, N, W, d)
    return from_columns(_attend(along_columns(inputs, decay, v_rows), backend))


def attention_weights(
    q: Tensor,
    k: Tensor,
    decay: Decay | None = None,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """How much each query takes of each token: the weights that decay_attention gives the values.

    Args:
        q: Queries, (B, N, L, d), floating point.
        k: Keys, same shape, dtype and device as q.
        decay: As in decay_attention. An AxialDecay's two softmaxes become the one matrix that they multiply to.
        attn_mask: As in decay_attention.
        scale: As in decay_attention.

    Returns:
        (B, N, L, L), float32 at least. Rows add up to 1; the row of a query that may attend to nothing is zero.

    Raises:
        TypeError, ValueError: as in decay_attention.
    """
    inputs = checked_inputs(q, k, k, decay, attn_mask, 0.0, scale)
    if not isinstance(decay, AxialDecay):
        return weights(inputs)
    rows = weights(along_rows(inputs, decay)).unflatten(0, (-1, decay.layout.height))  # (B, H, N, W, W)
    v_rows = to_rows(k, decay.layout)  # not looked at
    columns = weights(along_columns(inputs, decay, v_rows)).unflatten(0, (-1, decay.layout.width))  # (B, W, N, H, H)
    # From query (h, w) down its column to (g, w), then along row g to (g, u).
    together = torch.einsum("b w n h g, b g n w u -> b n h w g u", columns, rows)
    return together.flatten(4, 5).flatten(2, 3)


def explain_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Decay | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> str:
    """Which backend "auto" takes for these inputs, and why none of the others; to read, and to put into bug reports.

    Args:
        q: Queries, (B, N, L, d); as all the others as in decay_attention. It counts whether gradients are enabled and
            required.
        k: The same.
        v: The same.
        decay: The same.
        attn_mask: The same.
        dropout_p: The same.
        scale: The same.

    Returns:
        Lines of text; with an AxialDecay, for the attention along rows, then for that along columns.

    Raises:
        TypeError, ValueError: as in decay_attention.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 4, 49, 16, dtype=torch.float64)
        >>> decay = ManhattanDecay(torch.full((2, 4, 49), -0.05), Grid(7, 7))
        >>> print(explain_backend(q, k, v, decay))  # doctest: +ELLIPSIS
        math
          triton cannot: q is on cpu (needs cuda); torch.float64 (needs ...)
          native cannot: torch.float64 (needs float32, bfloat16 or float16)...
          lowrank cannot: ManhattanDecay (needs a decay with channels, ...)
          tiled could: 0.019 million scores are faster written out (math), ...
          sdpa could: 0.019 million scores are faster written out (math), ...
          flex cannot: torch.float64 (needs float32, float16 or bfloat16)
          triton_autotune cannot: q is on cpu (needs cuda); ...
    """
    inputs = checked_inputs(q, k, v, decay, attn_mask, dropout_p, scale)
    if not isinstance(decay, AxialDecay):
        return str(explain(inputs))
    rows, columns = along_rows(inputs, decay), along_columns(inputs, decay, to_rows(v, decay.layout))
    return f"along rows: {explain(rows)}\nalong columns: {explain(columns)}"


def _attend(inputs: Inputs, backend: str) -> Tensor:
    out = BACKENDS[choose(inputs, backend)].attention(inputs)
    return out if out.ndim == inputs.q.ndim else out.reshape(inputs.q.shape)
