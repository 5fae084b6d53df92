"""The public door for features: tokens and maps checked once, their layout read; tokens as maps, rows and columns."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from spatial_decay.layout import Grid, Layout, LayoutLike, Positions
from spatial_decay.values import are_readable

__all__ = [
    "as_tokens",
    "check_features",
    "columns_of_rows",
    "from_columns",
    "map_to_tokens",
    "to_columns",
    "to_rows",
    "tokens_to_map",
]


def as_tokens(x: Tensor, layout: LayoutLike = None, *, dim: int, num_prefix_tokens: int = 0) -> tuple[Tensor, Layout]:
    """Check features and read where their tokens lie.

    Args:
        x: Tokens (B, L, D) or a map (B, H, W, D), floating point.
        layout: (H, W) of the patch tokens, a Grid, or Positions of all L tokens. None: a map has its own; tokens are
            taken as a square.
        dim: D that the layer was built for.
        num_prefix_tokens: P that the layer was built for.

    Returns:
        Tokens (B, L, D), a view of x where x is contiguous, and their layout.

    Raises:
        TypeError: x is not floating point.
        ValueError: wrong rank or width; or a layout that cannot be that of these tokens.
    """
    check_features(x, dim)
    if x.ndim == 4:
        return x.flatten(1, 2), _grid_of_map(x, layout, num_prefix_tokens)
    if isinstance(layout, Layout):
        layout.check("x", batch_size=x.shape[0], num_tokens=x.shape[1], device=x.device)
        _check_prefix(layout, num_prefix_tokens)
        return x, layout
    return x, _grid_of_tokens(x.shape[1], layout, num_prefix_tokens)


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


def _grid_of_map(x: Tensor, layout: LayoutLike, num_prefix_tokens: int) -> Grid:
    height, width = x.shape[1:3]
    if num_prefix_tokens:
        raise ValueError(
            f"a map (B, H, W, D) has no place for prefix tokens: got shape {tuple(x.shape)} and "
            f"num_prefix_tokens = {num_prefix_tokens}. Pass tokens (B, L, D) with layout=(H, W)."
        )
    if isinstance(layout, Layout):
        _check_prefix(layout, 0)
        layout = layout.as_grid("a map", "Leave layout out for maps.").size
    if layout is not None and _checked_size(layout) != (height, width):
        raise ValueError(
            f"layout must be the (H, W) of the map: got {tuple(layout)} and a map of {height} x {width}. "
            "Leave layout out for maps."
        )
    return Grid(height, width)


def _grid_of_tokens(num_tokens: int, size: Any, num_prefix_tokens: int) -> Grid:
    num_patches = num_tokens - num_prefix_tokens
    if size is None:
        side = int(max(num_patches, 0) ** 0.5)  # torch.compile does not trace math.isqrt
        if num_patches < 1 or side * side != num_patches:
            raise ValueError(
                f"without layout, L - num_prefix_tokens must be a square: got L = {num_tokens}, "
                f"num_prefix_tokens = {num_prefix_tokens}, L - num_prefix_tokens = {num_patches}. "
                "Pass layout=(H, W), or set num_prefix_tokens for class and register tokens."
            )
        return Grid(side, side, num_prefix_tokens)
    height, width = _checked_size(size)
    if height * width != num_patches:
        raise ValueError(
            f"layout must satisfy H * W == L - num_prefix_tokens: got layout=({height}, {width}) "
            f"(H * W = {height * width}), L = {num_tokens}, num_prefix_tokens = {num_prefix_tokens}. "
            "Pass the layout of these tokens, or set num_prefix_tokens for class and register tokens."
        )
    return Grid(height, width, num_prefix_tokens)


def _checked_size(size: Any) -> tuple[int, int]:
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not is_pair or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 1 for n in size):
        got = type(size).__name__ if isinstance(size, Tensor) else repr(size)
        raise ValueError(
            "layout must be two positive integers (H, W), a Grid or Positions, or None: got "
            f"{got}. attn_mask comes after it."
        )
    return size[0], size[1]


def _check_prefix(layout: Layout, num_prefix_tokens: int) -> None:
    """Raise ValueError where a layout does not have the prefix tokens of the layer."""
    if isinstance(layout, Positions):
        found = _num_first_without_position(layout, num_prefix_tokens)
    else:
        found = layout.num_prefix_tokens
    if found != num_prefix_tokens:
        raise ValueError(
            f"the layout must have the layer's num_prefix_tokens = {num_prefix_tokens}, class and register tokens that "
            f"lie nowhere: got {layout}, {found} of them. Build the layer or the layout with the other number."
        )


def _num_first_without_position(layout: Positions, wanted: int) -> int:
    """How many of the first tokens lie nowhere, counted up to wanted; not asked where that would wait for a GPU."""
    known = layout.has_position
    if known is None:
        return 0
    if wanted == 0 or not are_readable(known):
        return wanted
    return int((~known[:, :wanted]).all(0).cumprod(0).sum())


# Views of a grid without prefix tokens; x is (B, N, L, d), features of heads, or (B, N, L), one value a token.


def to_rows(x: Tensor, grid: Grid) -> Tensor:
    """(B, N, H*W, ...) -> (B, H, N, W, ...): one sequence for each row of the grid."""
    return x.unflatten(2, grid.size).transpose(1, 2)


def to_columns(x: Tensor, grid: Grid) -> Tensor:
    """(B, N, H*W, ...) -> (B, W, N, H, ...): one sequence for each column of the grid."""
    return x.unflatten(2, grid.size).movedim(3, 1)


def columns_of_rows(x: Tensor) -> Tensor:
    """(B, H, N, W, ...) -> (B, W, N, H, ...): from the rows' sequences to the columns'."""
    return x.transpose(1, 3)


def from_columns(x: Tensor) -> Tensor:
    """(B, W, N, H, ...) -> (B, N, H*W, ...): the inverse of to_columns."""
    return x.movedim(1, 3).flatten(2, 3)


def tokens_to_map(x: Tensor, grid: Grid) -> Tensor:
    """Patch tokens (B, L, D) -> (B, D, H, W), a channels-last view for convolutions; prefix tokens are left out."""
    return rearrange(x[:, grid.num_prefix_tokens :], "b (h w) d -> b d h w", h=grid.height)


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> patch tokens (B, H*W, D)."""
    return rearrange(x, "b d h w -> b (h w) d")
