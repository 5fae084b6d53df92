"""Tokens that fill no grid."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from spatial_decay.layout.base import Layout, Steps, cumulative_sum
from spatial_decay.values import in_words

if TYPE_CHECKING:
    from spatial_decay.layout.grid import Grid


@dataclass(frozen=True, eq=False, repr=False)
class Positions(Layout):
    """A row and a column for each token, in any order; and which tokens lie nowhere.

    For tokens that fill no grid: patch dropout, packed images of several sizes, text beside an image. Nothing is added
    to any score that a token without a position takes part in: class, register and text tokens, and padding (which
    attn_mask must still hide).

    Args:
        h: Row of each token, (B, L), in grid steps, any real dtype; B is 1 where all images share them.
        w: Column of each token, the same.
        has_position: bool, (B, L) or (1, L), False for tokens that lie nowhere, whose h and w are not looked at.
            None: every token lies somewhere.
        grid_size: (H, W) of the grid that they are part of, as of_subset says it: a reference_grid needs it.

    Raises:
        ValueError: shapes or devices disagree; has_position is not bool; grid_size is no pair of numbers >= 1.

    Examples:
        >>> grid = Grid(3, 4, num_prefix_tokens=1)
        >>> kept = Positions.of_subset(torch.tensor([[0, 5, 11]]), grid)
        >>> kept.h.tolist(), kept.w.tolist(), kept.has_position.tolist()
        ([[0, 0, 1, 2]], [[0, 0, 1, 3]], [[False, True, True, True]])
    """

    h: Tensor
    w: Tensor
    has_position: Tensor | None = None
    grid_size: tuple[int, int] | None = None

    num_prefix_tokens: int = field(default=0, init=False)  # those without a position may be anywhere

    def __post_init__(self) -> None:
        if self.h.ndim != 2 or self.h.shape != self.w.shape or self.h.device != self.w.device:
            raise ValueError(
                f"h and w must both be (B, L) on one device: got {tuple(self.h.shape)} on {self.h.device} and "
                f"{tuple(self.w.shape)} on {self.w.device}. Where all images share them, B is 1."
            )
        size = self.grid_size
        if size is not None and not (isinstance(size, (tuple, list)) and len(size) == 2 and min(size) >= 1):
            raise ValueError(f"grid_size must be (H, W), both >= 1: got {size!r}.")
        known = self.has_position
        if known is None:
            return
        if known.dtype != torch.bool or known.shape not in (self.h.shape, (1, self.num_tokens)):
            raise ValueError(
                f"has_position must be bool, {tuple(self.h.shape)} as h is: got {known.dtype}, {tuple(known.shape)}."
            )
        if known.device != self.h.device:
            raise ValueError(f"has_position must be on the device of h, {self.h.device}: got {known.device}. Move one.")

    def __str__(self) -> str:
        return f"Positions of {self.num_tokens} tokens"

    def __repr__(self) -> str:
        known = "all lie somewhere" if self.has_position is None else "some lie nowhere"
        return f"Positions(h and w: {in_words(self.h)}, {known})"

    @classmethod
    def of_subset(cls, indices: Tensor, grid: "Grid") -> Self:
        """The patches that are left of a grid, by raster number and in any order, behind its prefix tokens.

        Args:
            indices: (B, K) of integers, 0 .. H * W - 1: timm's keep_indices, MAE's ids_keep.
            grid: The whole of it.

        Returns:
            Positions of the P + K tokens.
        """
        coordinates = torch.stack([indices // grid.width, indices % grid.width], -1)
        placed = cls.of_coordinates(coordinates, num_prefix_tokens=grid.num_prefix_tokens)
        return cls(placed.h, placed.w, placed.has_position, grid.size)

    @classmethod
    def of_coordinates(
        cls,
        coordinates: Tensor,
        is_patch: Tensor | None = None,
        *,
        num_prefix_tokens: int = 0,
        num_suffix_tokens: int = 0,
    ) -> Self:
        """Patches by their coordinates, between tokens that lie nowhere.

        Args:
            coordinates: (B, K, 2), row and column of each patch: NaFlex's patch_coord.
            is_patch: bool, (B, K), False for padding: NaFlex's patch_valid. None: there is none.
            num_prefix_tokens: Class, register or text tokens before the patches (Flux).
            num_suffix_tokens: Text tokens behind the patches (Stable Diffusion 3).

        Returns:
            Positions of all tokens, those without a position too.

        Raises:
            ValueError: coordinates are not (B, K, 2).
        """
        if coordinates.ndim != 3 or coordinates.shape[-1] != 2:
            raise ValueError(f"coordinates must be (B, K, 2), row and column: got shape {tuple(coordinates.shape)}.")
        around = (num_prefix_tokens, num_suffix_tokens)
        is_patch = torch.ones_like(coordinates[..., 0], dtype=torch.bool) if is_patch is None else is_patch.bool()
        h, w = (F.pad(axis, around) for axis in coordinates.unbind(-1))
        return cls(h, w, F.pad(is_patch, around))

    @property
    def num_tokens(self) -> int:
        return self.h.shape[1]

    @property
    def known(self) -> Tensor | None:
        return self.has_position

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        known = self.has_position
        return (self.h, self.w) if known is None else (self.h, self.w, known)

    @property
    def largest_step(self) -> float:
        """Unknown: to ask the tensors would wait for the GPU."""
        return math.inf

    def positions(self, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Row and column of each token, (B, 1, L) each, to broadcast over heads; 0 for those that lie nowhere."""
        h, w = (axis.to(device=device, dtype=dtype)[:, None] for axis in (self.h, self.w))
        if self.has_position is None:
            return h, w
        nowhere = ~self.has_position[:, None].to(device)
        return h.masked_fill(nowhere, 0.0), w.masked_fill(nowhere, 0.0)

    def steps(self, *, device: torch.device, dtype: torch.dtype, row_multiple: int = 1) -> Steps:
        """From token to token, (B, 1, L, L) each."""
        return tuple(
            self.keys(axis, row_multiple=row_multiple) - self.queries(axis)
            for axis in self.positions(device=device, dtype=dtype)
        )

    def queries(self, x: Tensor) -> Tensor:
        """(B, N, L) -> (B, N, L, 1)."""
        return x[..., None]

    def keys(self, x: Tensor, *, row_multiple: int = 1) -> Tensor:
        """(B, N, L) -> (B, N, 1, L), with zeros behind where L is no multiple."""
        padding = -self.num_tokens % row_multiple
        return (F.pad(x, (0, padding)) if padding else x)[..., None, :]

    def running_sum(self, cost: Tensor, *, inclusive: bool) -> Tensor:
        if self.has_position is not None:
            cost = cost.masked_fill(~self.has_position[:, None], 0.0)
        cost, order = torch.broadcast_tensors(cost, self.raster_order()[:, None])
        total = cumulative_sum(cost.gather(-1, order), inclusive=inclusive)
        return total.gather(-1, order.argsort(-1))

    def raster_order(self) -> Tensor:
        """The tokens as a raster scan meets them, (B, L) of token numbers; those that lie nowhere first.

        Returns:
            (B, L), whole numbers; B is 1 where all images share the positions.
        """
        h, w = (axis[:, 0] for axis in self.positions(device=self.h.device, dtype=torch.float64))
        order = torch.argsort(w, dim=1, stable=True)
        order = order.gather(1, torch.argsort(h.gather(1, order), dim=1, stable=True))
        if self.has_position is None:
            return order
        known = self.has_position.expand_as(order).gather(1, order)
        return order.gather(1, torch.argsort(known.long(), dim=1, stable=True))

    def raster_numbers(self, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        order = self.raster_order()
        h, w = (axis[:, 0].gather(1, order) for axis in self.positions(device=self.h.device, dtype=torch.float64))
        is_new = (h.diff() != 0) | (w.diff() != 0)
        numbers = F.pad(is_new.cumsum(1), (1, 0)).gather(1, order.argsort(1))
        return numbers[:, None].to(device=device, dtype=dtype)

    def subset(self, indices: Tensor, num_prefix_tokens: int) -> "Positions":
        prefix = torch.arange(num_prefix_tokens, device=indices.device).expand(len(indices), -1)
        rows = torch.cat([prefix, indices + num_prefix_tokens], 1)
        h, w = (axis.expand(len(rows), -1).gather(1, rows) for axis in (self.h, self.w))
        known = self.has_position
        known = None if known is None else known.expand(len(rows), -1).gather(1, rows)
        return Positions(h, w, known, self.grid_size)

    def behind(self, num_tokens: int) -> "Positions":
        known = torch.ones_like(self.h, dtype=torch.bool) if self.has_position is None else self.has_position
        h, w, known = (F.pad(x, (num_tokens, 0)) for x in (self.h, self.w, known))
        return Positions(h, w, known, self.grid_size)

    def check(self, of: str, *, batch_size: int, num_tokens: int, device: torch.device) -> None:
        super().check(of, batch_size=batch_size, num_tokens=num_tokens, device=device)
        if len(self.h) not in (1, batch_size):
            raise ValueError(
                f"Positions must be those of the B = {batch_size} images of {of}, or of 1: got {len(self.h)}."
            )
        if self.h.device != device:
            raise ValueError(f"Positions must be on the device of {of}, {device}: got {self.h.device}. Move one.")
