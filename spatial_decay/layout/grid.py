"""Patch tokens that fill a grid."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.layout.base import Layout, Steps, cumulative_sum
from spatial_decay.layout.positions import Positions


@dataclass(frozen=True)
class Grid(Layout):
    """H x W patch tokens in raster order, i = h_i * W + w_i, behind P prefix tokens that have no position.

    Args:
        height: H, rows of patch tokens.
        width: W, columns of patch tokens.
        num_prefix_tokens: P, class and register tokens, first in the sequence.

    Raises:
        ValueError: H or W < 1, or P < 0.
    """

    height: int
    width: int
    num_prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.num_prefix_tokens < 0:
            raise ValueError(
                f"a grid needs height >= 1, width >= 1 and num_prefix_tokens >= 0: got {self.height}, {self.width} "
                f"and {self.num_prefix_tokens}."
            )

    def __str__(self) -> str:
        return f"a grid of {self.height} x {self.width} patches behind {self.num_prefix_tokens} prefix tokens"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width

    @property
    def num_patches(self) -> int:
        """H * W."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """L = P + H * W."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def is_grid(self) -> bool:
        return True

    def as_grid(self, what: str, remedy: str = "") -> "Grid":
        """Itself."""
        del what, remedy
        return self

    @property
    def largest_step(self) -> float:
        return max(self.size) - 1

    def positions(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Row and column of each patch token: two tensors (H * W,) in raster order."""
        h, w = self._lines(device, dtype)
        return h[:, None].expand(self.size).flatten(), w.expand(self.size).flatten()

    def steps(self, *, device: torch.device, dtype: torch.dtype, row_multiple: int = 1) -> Steps:
        """To each row and to each column of the grid: (H * W, H, 1) and (H * W, 1, W), padded as `keys`.

        A formula of steps therefore does along each axis, H + W times a query, what it does before the axes meet.
        """
        h, w = self.positions(device=device, dtype=dtype)
        rows, columns = self._lines(device, dtype)
        extra_rows, extra_columns = self._extra(row_multiple)
        if extra_rows or extra_columns:
            rows, columns = F.pad(rows, (0, extra_rows)), F.pad(columns, (0, extra_columns))
        return rows[:, None] - h[:, None, None], columns - w[:, None, None]

    def queries(self, x: Tensor) -> Tensor:
        """(B, N, H * W) -> (B, N, H * W, 1, 1)."""
        return x[..., None, None]

    def keys(self, x: Tensor, *, row_multiple: int = 1) -> Tensor:
        """(B, N, H * W) -> (B, N, 1, H, W), with zeros added to a multiple of row_multiple places, where few do it."""
        extra_rows, extra_columns = self._extra(row_multiple)
        x = x.unflatten(-1, self.size)[..., None, :, :]
        return F.pad(x, (0, extra_columns, 0, extra_rows)) if extra_rows or extra_columns else x

    def running_sum(self, cost: Tensor, *, inclusive: bool) -> Tensor:
        """As in Layout; zero at prefix tokens."""
        num_prefix = self.num_prefix_tokens
        return F.pad(cumulative_sum(cost[..., num_prefix:], inclusive=inclusive), (num_prefix, 0))

    def raster_numbers(self, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.arange(self.num_patches, device=device, dtype=dtype)

    def subset(self, indices: Tensor, num_prefix_tokens: int) -> Positions:
        assert num_prefix_tokens == self.num_prefix_tokens
        return Positions.of_subset(indices, self)

    def behind(self, num_tokens: int) -> "Grid":
        return Grid(self.height, self.width, self.num_prefix_tokens + num_tokens)

    def _lines(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The numbers of the rows, (H,), and of the columns, (W,)."""
        h, w = (torch.arange(size, device=device, dtype=dtype) for size in self.size)
        return h, w

    def _extra(self, row_multiple: int) -> tuple[int, int]:
        """Rows below the grid, or columns beside a single row, so that its number of places is a multiple.

        None where they would be more than a quarter of it: then the caller pads what it makes of the keys.
        """
        if row_multiple == 1:  # a compiler need not hear of sizes
            return 0, 0
        if self.height == 1:
            return 0, -self.width % row_multiple
        extra = 0
        while (self.height + extra) * self.width % row_multiple:
            extra += 1
        return (extra if 4 * extra <= self.height else 0), 0
