"""Where tokens lie that do not fill a grid: patch dropout, packed images of several sizes, text beside an image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from spatial_decay.grid import Grid, GridSize, Position, as_tokens, check_features

__all__ = ["Positions", "as_placed_tokens"]


@dataclass(frozen=True, eq=False)
class Positions:
    """A row and a column for each token, in any order; and which tokens lie nowhere.

    It stands where a Grid does. Nothing is added to any score that a token without a position takes part in: class,
    register and text tokens, and padding (which attn_mask must still hide).

    Args:
        h: Row of each token, (B, L), in grid steps, any real dtype; B is 1 where all images share them.
        w: Column of each token, the same.
        has_position: bool, (B, L) or (1, L), False for tokens that lie nowhere, whose h and w are not looked at.
            None: every token lies somewhere.

    Raises:
        ValueError: shapes or devices disagree; has_position is not bool.

    Example:
        >>> kept = Positions.of_subset(torch.tensor([[0, 5, 11]]), Grid(3, 4, num_prefix_tokens=1))
        >>> kept.h.tolist(), kept.w.tolist(), kept.has_position.tolist()
        ([[0, 0, 1, 2]], [[0, 0, 1, 3]], [[False, True, True, True]])
    """

    h: Tensor
    w: Tensor
    has_position: Tensor | None = None

    def __post_init__(self) -> None:
        if self.h.ndim != 2 or self.h.shape != self.w.shape or self.h.device != self.w.device:
            raise ValueError(
                f"h and w must both be (B, L) on one device: got {tuple(self.h.shape)} on {self.h.device} and "
                f"{tuple(self.w.shape)} on {self.w.device}. Where all images share them, B is 1."
            )
        known = self.has_position
        if known is None:
            return
        if known.dtype != torch.bool or known.shape not in (self.h.shape, (1, self.num_tokens)):
            raise ValueError(
                f"has_position must be bool, {tuple(self.h.shape)} as h is: got {known.dtype}, {tuple(known.shape)}."
            )
        if known.device != self.h.device:
            raise ValueError(f"has_position must be on the device of h, {self.h.device}: got {known.device}. Move one.")

    @classmethod
    def of_subset(cls, indices: Tensor, grid: Grid) -> Self:
        """The patches that are left of a grid, by raster number and in any order, behind its prefix tokens.

        Args:
            indices: (B, K) of integers, 0 .. H * W - 1: timm's keep_indices, MAE's ids_keep.
            grid: The whole of it.
        """
        return cls.of_coordinates(
            torch.stack([indices // grid.width, indices % grid.width], -1), num_prefix_tokens=grid.num_prefix_tokens
        )

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
        """L."""
        return self.h.shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """0: tokens without a position may be anywhere in the sequence."""
        return 0

    def positions(self, *, device: torch.device, dtype: torch.dtype) -> Position:
        """Row and column of each token, (B, 1, L) each, to broadcast over heads; 0 for those that lie nowhere."""
        h, w = (axis.to(device=device, dtype=dtype)[:, None] for axis in (self.h, self.w))
        if self.has_position is None:
            return h, w
        nowhere = ~self.has_position[:, None].to(device)
        return h.masked_fill(nowhere, 0.0), w.masked_fill(nowhere, 0.0)

    def pairs(self) -> Tensor | None:
        """Whether query and key both lie somewhere, (B, 1, L, L); None: all do."""
        known = self.has_position
        return None if known is None else (known[:, :, None] & known[:, None, :])[:, None]

    def raster_order(self) -> Tensor:
        """The tokens as a raster scan meets them, (B, L) of token numbers; those that lie nowhere first."""
        h, w = self.h, self.w
        if self.has_position is not None:
            h, w = (axis.masked_fill(~self.has_position, -1) for axis in (h, w))
        by_column = torch.argsort(w, dim=1, stable=True)
        by_row = torch.argsort(h.gather(1, by_column), dim=1, stable=True)
        return by_column.gather(1, by_row)


def as_placed_tokens(
    x: Tensor,
    positions: Positions | None,
    *,
    dim: int,
    grid_size: GridSize | None = None,
    num_prefix_tokens: int = 0,
) -> tuple[Tensor, Grid | Positions]:
    """Check features at the public door: as_tokens, or where positions are given, tokens (B, L, D) at these.

    Raises:
        TypeError: x is not floating point.
        ValueError: as as_tokens; or positions together with a map or a grid_size, or of another number of tokens.
    """
    if positions is None:
        return as_tokens(x, dim=dim, grid_size=grid_size, num_prefix_tokens=num_prefix_tokens)
    check_features(x, dim)
    if x.ndim != 3 or grid_size is not None or x.shape[1] != positions.num_tokens:
        raise ValueError(
            "positions must be of all L tokens of x (B, L, D), without a grid_size: got positions of "
            f"{positions.num_tokens} tokens, x of shape {tuple(x.shape)} and grid_size={grid_size}."
        )
    return x, positions
