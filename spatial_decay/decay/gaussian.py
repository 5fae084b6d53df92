"""A Gaussian around each query, as wide and as high as the query says: LocAtViT (`gaussian`)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spatial_decay.decay.base import PairwiseDecay, Tokens
from spatial_decay.grid import Grid, Position
from spatial_decay.positions import Positions

__all__ = ["GaussianDecay"]


@dataclass(frozen=True)
class GaussianDecay(PairwiseDecay):
    """M[i, j] = a_i * exp(-((h_i - h_j)^2 / s_h,i + (w_i - w_j)^2 / s_w,i) / 2), LocAtViT's addition to the scores.

    Unlike the other kinds it is >= 0: it lifts what is near where they lower what is far.

    Args:
        amplitude: a, (B, N, L), nats; B may be 1, here and below. Values at prefix tokens are not used.
        variance_h: s_h, (B, N, L), > 0, in square grid steps.
        variance_w: s_w, the same along the width.
        grid: The grid of the L tokens, or their Positions.
        max_distance: Distances along an axis count as this at most, in grid steps: LocAtViT's clamp.
    """

    amplitude: Tensor
    variance_h: Tensor
    variance_w: Tensor
    grid: Grid | Positions
    max_distance: float = math.inf

    @property
    def tokens(self) -> Tokens:
        return (self.amplitude, self.variance_h, self.variance_w)

    def pairwise(
        self,
        q_token: Tokens,
        k_token: Tokens,  # noqa: ARG002  the query says it all
        q_position: Position,
        k_position: Position,
    ) -> Tensor:
        amplitude, variance_h, variance_w = q_token
        (q_h, q_w), (k_h, k_w) = q_position, k_position
        return amplitude * torch.exp(self._exponent(q_h - k_h, variance_h) + self._exponent(q_w - k_w, variance_w))

    def profiles(self, tokens: Tokens, position: Position) -> tuple[Tensor, Tensor] | None:
        if isinstance(self.grid, Positions):
            return None
        rows, columns = self.exponents(tokens, position, self.grid)
        return tokens[0][..., None] * rows.exp(), columns.exp()

    def exponents(self, tokens: Tokens, position: Position, grid: Grid) -> tuple[Tensor, Tensor]:
        """-dh^2 / (2 s_h) to each row of a grid and -dw^2 / (2 s_w) to each column, (B, N, n, H) and (B, N, n, W)."""
        amplitude, variance_h, variance_w = (token[..., None] for token in tokens)
        rows, columns = (torch.arange(size, dtype=amplitude.dtype, device=amplitude.device) for size in grid.size)
        h, w = (p[:, None] for p in position)
        return self._exponent(h - rows, variance_h), self._exponent(w - columns, variance_w)

    def _exponent(self, steps: Tensor, variance: Tensor) -> Tensor:
        return steps.abs().clamp(max=self.max_distance).square() / (-2 * variance)
