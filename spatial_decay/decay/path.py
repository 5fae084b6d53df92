"""Decay that adds up along the raster sequence: SDT Eq. 6 (`1d`), Table 4's `bidirectional`, each axis of Eq. 11."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import PairwiseDecay, Tokens
from spatial_decay.grid import Grid, Position
from spatial_decay.positions import Positions
from spatial_decay.precision import at_least_float32

__all__ = ["PathDecay"]


@dataclass(frozen=True)
class PathDecay(PairwiseDecay):
    """M[i, j] = -|c_i - c_j|: what the path along the raster sequence from one token to the other costs.

    Args:
        cumulative: c, (B, N, L), nats, growing along the raster sequence; B may be 1. Its values at prefix tokens
            are not used.
        grid: The grid of the L tokens, or their Positions.
        causal: A query attends to itself and to earlier tokens only: -inf above the diagonal.
    """

    cumulative: Tensor
    grid: Grid | Positions
    causal: bool = False

    @classmethod
    def from_gate(cls, gate: Tensor, grid: Grid | Positions, *, causal: bool = False) -> Self:
        """SDT Eq. 6 from a gate g (B, N, L): minus the sum of |g_k| for k = min(i, j) .. max(i, j) - 1.

        Differs from Eq. 6, which is written for i > j only: vision is not causal, so this is its symmetric
        extension. causal=True gives Eq. 6 itself, with -inf above the diagonal.
        """
        return cls(_cumulative(gate, grid, inclusive=False), grid, causal)

    @classmethod
    def bidirectional(cls, forward_gate: Tensor, backward_gate: Tensor, grid: Grid | Positions) -> Self:
        """The mean of two `1d` masks with a gate each (SDT Table 4), gates (B, N, L).

        The forward scan sums k = min .. max - 1, the backward scan k = min + 1 .. max. Both sums grow along the raster
        sequence, so their mean is again one c.
        """
        forward = _cumulative(forward_gate, grid, inclusive=False)
        backward = _cumulative(backward_gate, grid, inclusive=True)
        return cls((forward + backward) / 2, grid)

    @property
    def tokens(self) -> Tokens:
        return (self.cumulative,)

    def pairwise(self, q_token: Tokens, k_token: Tokens, q_position: Position, k_position: Position) -> Tensor:
        (q_h, q_w), (k_h, k_w) = q_position, k_position
        later = (k_h > q_h) | ((k_h == q_h) & (k_w > q_w))  # the key comes after the query in raster order
        difference = q_token[0] - k_token[0]
        if isinstance(self.grid, Positions):  # two tokens may share a position, and neither is later
            decay = -difference.abs()
        else:
            # Because c grows, -|c_i - c_j| is c_i - c_j for later keys and c_j - c_i for the others: two passes over
            # the pairs and one backward, where -abs() takes three and three.
            decay = difference * torch.where(later, 1.0, -1.0).to(difference.dtype)
        return torch.where(later, torch.full_like(decay, float("-inf")), decay) if self.causal else decay


def _cumulative(gate: Tensor, grid: Grid | Positions, *, inclusive: bool) -> Tensor:
    """The sum of |g_k| over k < i, or k <= i; zero at prefix tokens, whose gates belong to no path.

    Along the raster scan: tokens with Positions, of which those that lie somewhere count, may come in any order.
    """
    cost = at_least_float32(gate).abs()[..., grid.num_prefix_tokens :]
    if isinstance(grid, Positions):
        if grid.has_position is not None:
            cost = cost.masked_fill(~grid.has_position[:, None], 0.0)
        cost, order = torch.broadcast_tensors(cost, grid.raster_order()[:, None])
        total = _running_sum(cost.gather(-1, order), inclusive=inclusive)
        return total.gather(-1, order.argsort(-1))
    return F.pad(_running_sum(cost, inclusive=inclusive), (grid.num_prefix_tokens, 0))


def _running_sum(cost: Tensor, *, inclusive: bool) -> Tensor:
    return (cost if inclusive else F.pad(cost, (1, 0))[..., :-1]).cumsum(-1)
