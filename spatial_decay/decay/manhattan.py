"""Decay with the Manhattan distance: SDT Eq. 7-9 (`full`, content-aware) and RMT's constant rates (`fixed`)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import PairwiseDecay, Tokens
from spatial_decay.grid import Grid, Position, manhattan_distance
from spatial_decay.positions import Positions
from spatial_decay.precision import at_least_float32

__all__ = ["ManhattanDecay", "fixed_rates"]


@dataclass(frozen=True)
class ManhattanDecay(PairwiseDecay):
    """M[i, j] = (a_i + a_j) * d_M(i, j).

    With a = alpha * G / 2 this is SDT Eq. 8-9, -|(G_i + G_j) / 2 * d_M * alpha|, because G <= 0 and alpha > 0.
    With a = -|lambda_n| / 2 for all tokens of a head it is RMT's fixed decay.

    Args:
        strength: a, (B, N, L), <= 0, nats per grid step; B may be 1. Its values at prefix tokens are not used.
        grid: The grid of the L tokens, or their Positions.
    """

    strength: Tensor
    grid: Grid | Positions

    @classmethod
    def from_gate(cls, gate: Tensor, grid: Grid | Positions, *, alpha: float = 0.1) -> Self:
        """SDT Eq. 8-9 from a gate G (B, N, L) <= 0 and the scale alpha > 0."""
        return cls(at_least_float32(gate) * (alpha / 2), grid)

    @classmethod
    def constant(cls, rates: Tensor, grid: Grid | Positions) -> Self:
        """-|lambda_n| * d_M from one rate a head, (N,), nats per grid step."""
        strength = at_least_float32(rates).abs() / -2
        return cls(strength[None, :, None].expand(1, -1, grid.num_tokens), grid)

    @property
    def tokens(self) -> Tokens:
        return (self.strength,)

    def pairwise(self, q_token: Tokens, k_token: Tokens, q_position: Position, k_position: Position) -> Tensor:
        return (q_token[0] + k_token[0]) * manhattan_distance(q_position, k_position)


def fixed_rates(
    num_heads: int, *, initial_value: float, heads_range: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """RMT's rates lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)) < 0, (N,), nats per grid step.

    Head 0 looks at the nearest tokens only; the last head sees nearly everything.
    """
    n = torch.arange(num_heads, device=device, dtype=dtype)
    return torch.log1p(-torch.exp2(-initial_value - heads_range * n / num_heads))
