"""From features to a decay: the gates and constants of every kind (SDT Eq. 4-11, Tables 3-4; RMT; LocAtViT)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PathDecay, dense, fixed_rates
from spatial_decay.grid import Grid, GridSize
from spatial_decay.layers.gate import ContextAwareGate
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.ops.sdpa import row_multiple
from spatial_decay.positions import Positions, as_placed_tokens

__all__ = ["DECAY_KINDS", "SpatialDecayMask"]


class SpatialDecayMask(nn.Module):
    """What spatial decay adds to the attention scores of these features.

    | kind | what is added to the score of query i and key j | source |
    |---|---|---|
    | `full` | -abs((G_i + G_j) / 2 * d_M(i, j) * alpha) | SDT Eq. 7-9 |
    | `fixed` | -abs(lambda_n) * d_M(i, j) | RMT; SDT Table 3 |
    | `1d` | -sum of abs(g_k), k = min(i, j) .. max(i, j) - 1 over the raster sequence | SDT Eq. 6 |
    | `bidirectional` | the mean of a forward and a backward `1d` with a gate each | SDT Table 4 |
    | `decomposed` | `1d` within rows, then within columns, a gate each; no alpha | SDT Eq. 11-12 |
    | `fixed_decomposed` | -abs(lambda_n) * distance within rows, then within columns | RMT's first stages |
    | `gaussian` | a_i * exp(-(dh^2 / s_h,i + dw^2 / s_w,i) / 2) | LocAtViT |
    | `none` | nothing | SDT Table 3 |

    The features of kind `gaussian` are the queries, heads side by side; of the others, what the queries are made of.

    Args:
        dim: D, width of the features.
        num_heads: N.
        kind: One of the table's.
        alpha: Scale of `full`, > 0. The other kinds have none.
        num_prefix_tokens: P, class and register tokens, first in the sequence. Nothing is added to any score that they
            take part in. The decomposed kinds have no place for them.
        gate_bias: Give the gates a trained bias.
        gate_bias_init: Its first value, see ContextAwareGate.
        causal: `1d` only: Eq. 6 as written, -inf above the diagonal. Otherwise its symmetric extension.
        initial_value: Of the fixed kinds, lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)).
        heads_range: Of the fixed kinds.
        initial_grid_size: `gaussian` only: (H, W) that the model is trained on, see GaussianGate.

    Raises:
        ValueError: unknown kind; alpha <= 0 or not finite; prefix tokens with a decomposed kind; causal with a kind
            other than `1d`; initial_value and heads_range that give no rate; num_heads < 1.

    Example:
        >>> mask = SpatialDecayMask(dim=192, num_heads=3, num_prefix_tokens=1)
        >>> x = torch.randn(2, 1 + 14 * 14, 192)
        >>> mask(x).shape
        torch.Size([2, 3, 197, 197])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kind: str = "full",
        alpha: float = 0.1,
        num_prefix_tokens: int = 0,
        gate_bias: bool = False,
        gate_bias_init: float = 0.0,
        causal: bool = False,
        initial_value: float = 2.0,
        heads_range: float = 4.0,
        initial_grid_size: GridSize = (14, 14),
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1: got {num_heads}.")
        if kind not in _KINDS:
            raise ValueError(f"kind of decay must be one of {', '.join(_KINDS)}: got {kind!r}.")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be finite and > 0: got {alpha}. For no decay at all use kind 'none'.")
        lowest = initial_value + min(0.0, heads_range * (num_heads - 1) / num_heads)
        if not (math.isfinite(initial_value) and math.isfinite(heads_range) and lowest > 0):
            raise ValueError(
                "the fixed kinds need finite values with initial_value + heads_range * n / N > 0 for every head n: got "
                f"initial_value={initial_value}, heads_range={heads_range}, N = {num_heads}."
            )
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be >= 0: got {num_prefix_tokens}.")
        if num_prefix_tokens and kind in ("decomposed", "fixed_decomposed"):
            raise ValueError(
                f"kind {kind!r} needs num_prefix_tokens = 0, because class and register tokens belong to no row or "
                f"column: got num_prefix_tokens={num_prefix_tokens}. Use another kind, for instance 'full'."
            )
        if causal and kind != "1d":
            raise ValueError(f"causal=True needs kind '1d' (Eq. 6): got kind {kind!r}.")
        self.dim, self.num_heads, self.num_prefix_tokens = dim, num_heads, num_prefix_tokens
        self.kind, self.alpha, self.causal = kind, alpha, causal
        self.initial_value, self.heads_range = initial_value, heads_range
        for name in _KINDS[kind].gates:
            self.add_module(name, ContextAwareGate(dim, num_heads, bias=gate_bias, bias_init=gate_bias_init))
        self.gaussian = GaussianGate(dim // num_heads, initial_grid_size) if kind == "gaussian" else None

    def bias(self, x: Tensor, grid_size: GridSize | None = None, positions: Positions | None = None) -> Decay | None:
        """The decay as a description that no one has to materialise, for decay_attention.

        Args:
            x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
            grid_size: (H, W) of the patch tokens. None: a map has its own; tokens are taken as a square.
            positions: Of all L tokens that fill no grid, in place of grid_size and of num_prefix_tokens. Not for the
                decomposed kinds, and not for `gaussian`, whose width depends on the grid.

        Returns:
            A ManhattanDecay, PathDecay, GaussianDecay or AxialDecay, float32 at least; None for kind `none`.

        Raises:
            TypeError, ValueError: x or grid_size do not fit, see the message.
        """
        tokens, grid = as_placed_tokens(
            x, positions, dim=self.dim, grid_size=grid_size, num_prefix_tokens=self.num_prefix_tokens
        )
        return self.describe(tokens, grid)

    def describe(self, tokens: Tensor, grid: Grid | Positions) -> Decay | None:
        """As bias, of tokens (B, L, D) that have been checked and whose layout is known.

        Raises:
            ValueError: Positions with a kind that needs a whole grid.
        """
        if isinstance(grid, Positions) and not _KINDS[self.kind].takes_positions:
            raise ValueError(
                f"kind {self.kind!r} needs a whole grid: got Positions. Use another kind, for instance 'full'."
            )
        return _KINDS[self.kind].describe(self, tokens, grid)

    def forward(
        self, x: Tensor, grid_size: GridSize | None = None, positions: Positions | None = None
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """The decay as attn_mask for F.scaled_dot_product_attention, in the dtype of x.

        Returns:
            (B, N, L, L). For decomposed kinds the pair M_H (B, W, N, H, H), M_W (B, H, N, W, W). None for `none`.
        """
        bias = self.bias(x, grid_size, positions)
        if bias is None:
            return None
        if not isinstance(bias, AxialDecay):
            mask = dense(bias, dtype=x.dtype, row_multiple=row_multiple(x.device))
            return mask.expand(x.shape[0], -1, -1, -1)
        height, width = bias.grid.size
        columns = dense(bias.columns, dtype=x.dtype, row_multiple=row_multiple(x.device))
        rows = dense(bias.rows, dtype=x.dtype, row_multiple=row_multiple(x.device))
        return (
            columns.expand(x.shape[0] * width, -1, -1, -1).unflatten(0, (x.shape[0], width)),
            rows.expand(x.shape[0] * height, -1, -1, -1).unflatten(0, (x.shape[0], height)),
        )

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, alpha={self.alpha}, num_prefix_tokens={self.num_prefix_tokens}"

    def _gate(self, name: str, x: Tensor) -> Tensor:
        """G of one of the kind's gates, (B, N, L)."""
        return self.get_submodule(name)(x).transpose(1, 2)

    def _rates(self, x: Tensor) -> Tensor:
        """lambda_n, (N,). Made anew for each call: a buffer would follow the model into half precision."""
        return fixed_rates(
            self.num_heads,
            initial_value=self.initial_value,
            heads_range=self.heads_range,
            device=x.device,
            dtype=torch.promote_types(x.dtype, torch.float32),
        )


@dataclass(frozen=True)
class _Kind:
    gates: tuple[str, ...]
    describe: Callable[[SpatialDecayMask, Tensor, Any], Decay | None]  # the grid, or Positions where it takes them
    takes_positions: bool = True


def _full(mask: SpatialDecayMask, x: Tensor, grid: Grid | Positions) -> Decay:
    return ManhattanDecay.from_gate(mask._gate("gate", x), grid, alpha=mask.alpha)


def _fixed(mask: SpatialDecayMask, x: Tensor, grid: Grid | Positions) -> Decay:
    return ManhattanDecay.constant(mask._rates(x), grid)


def _1d(mask: SpatialDecayMask, x: Tensor, grid: Grid | Positions) -> Decay:
    return PathDecay.from_gate(mask._gate("gate", x), grid, causal=mask.causal)


def _bidirectional(mask: SpatialDecayMask, x: Tensor, grid: Grid | Positions) -> Decay:
    return PathDecay.bidirectional(mask._gate("gate_forward", x), mask._gate("gate_backward", x), grid)


def _decomposed(mask: SpatialDecayMask, x: Tensor, grid: Grid) -> Decay:
    return AxialDecay.from_gates(mask._gate("gate_h", x), mask._gate("gate_w", x), grid)


def _fixed_decomposed(mask: SpatialDecayMask, x: Tensor, grid: Grid) -> Decay:
    return AxialDecay.constant(mask._rates(x), grid)


def _gaussian(mask: SpatialDecayMask, x: Tensor, grid: Grid) -> Decay:
    assert mask.gaussian is not None
    q = x.unflatten(-1, (mask.num_heads, -1)).transpose(1, 2)  # (B, N, L, d)
    return mask.gaussian(q, grid)


def _none(mask: SpatialDecayMask, x: Tensor, grid: Grid | Positions) -> None:
    return None


_KINDS = {
    "full": _Kind(("gate",), _full),
    "fixed": _Kind((), _fixed),
    "1d": _Kind(("gate",), _1d),
    "bidirectional": _Kind(("gate_forward", "gate_backward"), _bidirectional),
    "decomposed": _Kind(("gate_h", "gate_w"), _decomposed, takes_positions=False),
    "fixed_decomposed": _Kind((), _fixed_decomposed, takes_positions=False),
    "gaussian": _Kind((), _gaussian, takes_positions=False),
    "none": _Kind((), _none),
}

DECAY_KINDS = tuple(_KINDS)
"""The names of all kinds."""
