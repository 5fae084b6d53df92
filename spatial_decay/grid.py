"""Token grids: sizes, positions, the Manhattan distance (SDT Eq. 7), and tokens as maps, rows and columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

__all__ = [
    "Grid",
    "GridSize",
    "Position",
    "as_tokens",
    "check_features",
    "columns_of_rows",
    "from_columns",
    "manhattan_distance",
    "map_to_tokens",
    "to_columns",
    "to_rows",
    "tokens_to_map",
]

GridSize: TypeAlias = Sequence[int]
"""(H, W): rows and columns of patch tokens; never (W, H)."""

Position: TypeAlias = tuple[Tensor, Tensor]
"""(h, w) of tokens: two tensors of row and column numbers that broadcast together, in grid steps."""


@dataclass(frozen=True)
class Grid:
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

    def positions(self, *, device: torch.device, dtype: torch.dtype) -> Position:
        """Row and column of each patch token: two tensors (H*W,) in raster order."""
        h, w = (torch.arange(size, device=device, dtype=dtype) for size in self.size)
        return h[:, None].expand(self.size).flatten(), w.expand(self.size).flatten()


def manhattan_distance(p: Position, q: Position) -> Tensor:
    """d_M = |h_p - h_q| + |w_p - w_q| in grid steps (SDT Eq. 7), over broadcast positions."""
    (h_p, w_p), (h_q, w_q) = p, q
    return (h_p - h_q).abs() + (w_p - w_q).abs()


def as_tokens(
    x: Tensor, *, dim: int, grid_size: GridSize | None = None, num_prefix_tokens: int = 0
) -> tuple[Tensor, Grid]:
    """Check features at the public door and read their grid.

    Args:
        x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
        dim: D that the layer was built for.
        grid_size: (H, W) of the patch tokens. None: a map has its own; tokens are taken as a square.
        num_prefix_tokens: P.

    Returns:
        Tokens (B, L, D), a view of x where x is contiguous, and their grid.

    Raises:
        TypeError: x is not floating point.
        ValueError: wrong rank or width; or a grid that cannot be the one of these tokens.
    """
    check_features(x, dim)
    if x.ndim == 4:
        return x.flatten(1, 2), _grid_of_map(x, grid_size, num_prefix_tokens)
    return x, _grid_of_tokens(x.shape[1], grid_size, num_prefix_tokens)


def check_features(x: Tensor, dim: int) -> None:
    """Raise TypeError or ValueError where x is neither tokens (B, L, D) nor a map (B, H, W, D), floating point."""
    if not x.is_floating_point():
        raise TypeError(
            f"x must be floating point: got {x.dtype}. Convert it first, for instance x.float() (pixels: x / 255)."
        )
    if x.ndim not in (3, 4):
        raise ValueError(
            f"x must be tokens (B, L, D) or a map (B, H, W, D): got shape {tuple(x.shape)}. "
            "Add the batch dimension, or flatten what else there is."
        )
    if x.shape[-1] != dim:
        raise ValueError(
            f"the last dimension of x must be dim = {dim}: got shape {tuple(x.shape)}. "
            "Maps are channels-last, (B, H, W, D): permute a (B, D, H, W) tensor with x.permute(0, 2, 3, 1)."
        )


def _grid_of_map(x: Tensor, grid_size: GridSize | None, num_prefix_tokens: int) -> Grid:
    height, width = x.shape[1:3]
    if num_prefix_tokens:
        raise ValueError(
            f"a map (B, H, W, D) has no place for prefix tokens: got shape {tuple(x.shape)} and "
            f"num_prefix_tokens = {num_prefix_tokens}. Pass tokens (B, L, D) with grid_size=(H, W)."
        )
    if grid_size is not None and _checked_size(grid_size) != (height, width):
        raise ValueError(
            f"grid_size must be the (H, W) of the map: got grid_size={tuple(grid_size)} and a map of "
            f"{height} x {width}. Leave grid_size out for maps."
        )
    return Grid(height, width)


def _grid_of_tokens(num_tokens: int, grid_size: GridSize | None, num_prefix_tokens: int) -> Grid:
    num_patches = num_tokens - num_prefix_tokens
    if grid_size is None:
        side = int(max(num_patches, 0) ** 0.5)  # torch.compile does not trace math.isqrt
        if num_patches < 1 or side * side != num_patches:
            raise ValueError(
                f"without grid_size, L - num_prefix_tokens must be a square: got L = {num_tokens}, "
                f"num_prefix_tokens = {num_prefix_tokens}, L - num_prefix_tokens = {num_patches}. "
                "Pass grid_size=(H, W), or set num_prefix_tokens for class and register tokens."
            )
        return Grid(side, side, num_prefix_tokens)
    height, width = _checked_size(grid_size)
    if height * width != num_patches:
        raise ValueError(
            f"grid_size must satisfy H * W == L - num_prefix_tokens: got grid_size=({height}, {width}) "
            f"(H * W = {height * width}), L = {num_tokens}, num_prefix_tokens = {num_prefix_tokens}. "
            "Pass the grid_size of these tokens, or set num_prefix_tokens for class and register tokens."
        )
    return Grid(height, width, num_prefix_tokens)


def _checked_size(grid_size: Any) -> tuple[int, int]:
    is_pair = isinstance(grid_size, (tuple, list)) and len(grid_size) == 2
    if not is_pair or not all(isinstance(size, (int, torch.SymInt)) and size >= 1 for size in grid_size):
        got = type(grid_size).__name__ if isinstance(grid_size, Tensor) else repr(grid_size)
        raise ValueError(f"grid_size must be two positive integers (H, W): got {got}. attn_mask comes after it.")
    return grid_size[0], grid_size[1]


# Views of a grid without prefix tokens; x is (B, N, L, d), features of heads, or (B, N, L), one value a token.


def to_rows(x: Tensor, grid: Grid) -> Tensor:
    """(B, N, H*W, ...) -> (B, H, N, W, ...): one sequence for each row of the grid."""
    return rearrange(x, "b n (h w) ... -> b h n w ...", h=grid.height, w=grid.width)


def to_columns(x: Tensor, grid: Grid) -> Tensor:
    """(B, N, H*W, ...) -> (B, W, N, H, ...): one sequence for each column of the grid."""
    return rearrange(x, "b n (h w) ... -> b w n h ...", h=grid.height, w=grid.width)


def columns_of_rows(x: Tensor) -> Tensor:
    """(B, H, N, W, ...) -> (B, W, N, H, ...): from the rows' sequences to the columns'."""
    return x.transpose(1, 3)


def from_columns(x: Tensor) -> Tensor:
    """(B, W, N, H, ...) -> (B, N, H*W, ...): the inverse of to_columns."""
    return rearrange(x, "b w n h ... -> b n (h w) ...")


def tokens_to_map(x: Tensor, grid: Grid) -> Tensor:
    """Patch tokens (B, L, D) -> (B, D, H, W), a channels-last view for convolutions; prefix tokens are left out."""
    return rearrange(x[:, grid.num_prefix_tokens :], "b (h w) d -> b d h w", h=grid.height)


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> patch tokens (B, H*W, D)."""
    return rearrange(x, "b d h w -> b (h w) d")
