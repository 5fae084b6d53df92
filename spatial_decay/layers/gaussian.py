"""LocAtViT's Gaussian: from each query, how wide and how high the window around it is."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.decay import GaussianDecay
from spatial_decay.layers.initial import Linear
from spatial_decay.layout import Grid, GridSize
from spatial_decay.precision import autocast_disabled

__all__ = ["GaussianGate"]

# min() would ask a compiler which one is less, for good. That of torch 2.6 cannot trace sym_min.
_least: Any = torch.sym_min if torch.__version__ >= "2.7" else min


class GaussianGate(nn.Module):
    """Amplitude and variances of a Gaussian for each query, from the query itself (Hajimiri et al. 2026, LocAtViT).

    a = softplus(W_a q + b_a),    s = m^2 * sigmoid(W_s q + b_s - log(m^2 - 1)) * r + eps

    with m the longer side of the grid that the model is trained on, so that s = 1 + eps where W_s q + b_s = 0. On
    another grid s grows by r, the ratio of the shorter sides. eps is 0.1, more on large grids, and distances count as
    m - 1 steps (114 at most) where the grid is larger: the authors' bounds for half precision. Computed in float32 at
    least, and exactly: the authors' code trains grids from 32 rows on with one Gaussian for each 2 x 2 queries.

    Args:
        head_dim: d; the heads share the weights.
        reference_grid: (H, W) of the patch tokens that the model is trained on.

    Raises:
        ValueError: reference_grid is not two numbers >= 1.
    """

    def __init__(self, head_dim: int, reference_grid: GridSize = (14, 14)) -> None:
        super().__init__()
        if len(reference_grid) != 2 or min(reference_grid) < 1:
            raise ValueError(f"reference_grid must be (H, W), both >= 1: got {reference_grid!r}.")
        self.reference_grid = (int(reference_grid[0]), int(reference_grid[1]))
        self.log_var = _PreciseLinear(head_dim, 2)
        self.log_alpha = _PreciseLinear(head_dim, 1)

    def forward(self, q: Tensor, grid: Grid) -> GaussianDecay:
        """Queries (B, N, L, d) of a grid -> the Gaussian around each, float32 at least.

        Args:
            q: Queries, (B, N, L, d).
            grid: Where the L tokens lie.

        Returns:
            Numbers (B, N, L) of each query and the grid.
        """
        longest = max(self.reference_grid)
        coefficient = longest**2
        shift = math.log(coefficient - 1) if coefficient > 2 else 0.0
        ratio: Any = _shorter_side(grid) / min(self.reference_grid)
        with autocast_disabled(q.device):
            amplitude = F.softplus(self.log_alpha(q))[..., 0]  # (B, N, L)
            variance = torch.sigmoid(self.log_var(q) - shift) * (coefficient * ratio) + self._eps()
        return GaussianDecay(
            amplitude, variance[..., 0], variance[..., 1], grid, max_distance=min(longest - 1, math.sqrt(2 * 6550))
        )

    def extra_repr(self) -> str:
        return f"reference_grid={self.reference_grid}"

    def _eps(self) -> float:
        """The authors': doubled from 0.1 until half of the largest squared distance over eps^2 is below 65000 / 2."""
        eps = 0.1
        while 0.5 * (max(self.reference_grid) - 1) ** 2 / eps**2 > 65000 / 2:
            eps *= 2
        return eps


def _shorter_side(grid: Grid) -> Any:
    """min(H, W); to torch.jit.trace sizes are tensors, float64 here so that it divides as Python does."""
    size: Any = grid.size
    return torch.minimum(*size).double() if isinstance(size[0], Tensor) else _least(*size)


class _PreciseLinear(Linear):
    """In float32 at least; it is called as a module, so that adapters and offloading find it."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
