"""Rotary position embedding of queries and keys, R(.) of SDT Eq. 13: along both axes, or along the raster (RMT)."""

from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.layers.reference import as_reference_grid, step_ratio
from spatial_decay.layout import GridSize, Layout
from spatial_decay.precision import at_least_float32
from spatial_decay.values import is_jit_tracing

__all__ = ["RopeMode", "RotaryEmbedding"]

RopeMode: TypeAlias = Literal["axial", "flat", "none"]


class RotaryEmbedding(nn.Module):
    """Turns each pair of channels (2m, 2m + 1) by an angle that grows with the token's position.

    "axial": the first half of the channels turns with the row h, the second half with the column w.
    "flat": all channels turn with the raster index h * W + w (RMT's).
    "none": q and k stay as they are.
    With n frequencies an axis, the m-th is 10000 ** (-m / (n - 1)), RMT's spacing. Prefix tokens are not turned.
    The paper does not say which of the two it means; "axial" knows both axes at any image size.

    Angles that a model has not seen in training are the first thing that fails on larger images. With reference_grid,
    (H0, W0), rows count H0 / H and columns W0 / W, so that angles stay those of the size trained on, to within a step.

    Args:
        head_dim: d.
        mode: "axial", "flat" or "none".
        reference_grid: (H0, W0) of the patch tokens trained on, for "axial". None: a step is a step on any grid.

    Raises:
        ValueError: unknown mode; d not a multiple of 4 ("axial") or 2 ("flat"); a reference_grid with another mode.
    """

    def __init__(self, head_dim: int, mode: RopeMode = "axial", reference_grid: GridSize | None = None) -> None:
        super().__init__()
        if mode not in get_args(RopeMode):
            raise ValueError(f"rope must be one of {', '.join(get_args(RopeMode))}: got {mode!r}.")
        needed = {"axial": 4, "flat": 2, "none": 1}[mode]
        if head_dim % needed:
            raise ValueError(
                f"rope={mode!r} needs head_dim to be a multiple of {needed}: got head_dim = {head_dim}. "
                "Change num_heads, or use rope='flat' (multiples of 2) or rope='none'."
            )
        if reference_grid is not None and mode != "axial":
            raise ValueError(
                f"rope_reference_grid needs rope='axial': got rope={mode!r} and "
                f"{reference_grid!r}. Leave one of the two out."
            )
        self.head_dim, self.mode = head_dim, mode
        self.reference_grid = None
        if reference_grid is not None:
            self.reference_grid = as_reference_grid(reference_grid, "rope_reference_grid")

    def forward(self, q: Tensor, k: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, N, L, d) -> the same, turned; angles in float32 at least.

        Args:
            q: Queries, (B, N, L, d).
            k: Keys, the same.
            layout: Where the L tokens lie; those that lie nowhere are not turned.

        Returns:
            q and k, in their own dtype.

        Raises:
            ValueError: Positions in mode "flat", whose raster numbers need a whole grid; Positions without a grid_size
                with a reference_grid.
        """
        if self.mode == "none":
            return q, k
        turns = _turns(self._angles(layout, q))
        return _turn(q, turns), _turn(k, turns)

    def extra_repr(self) -> str:
        reference = "" if self.reference_grid is None else f", reference_grid={self.reference_grid}"
        return f"head_dim={self.head_dim}, mode={self.mode!r}{reference}"

    def _angles(self, layout: Layout, like: Tensor) -> Tensor:
        """One for each token and pair of channels, (L, d/2); (B, 1, L, d/2) of Positions."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        h, w = layout.positions(device=like.device, dtype=dtype)
        if self.mode == "flat":
            width = layout.as_grid("rope='flat'", "Use rope='axial' or 'none'.").width
            axes: tuple[Tensor, ...] = (h * width + w,)
        elif self.reference_grid is None:
            axes = (h, w)
        else:
            rows, columns = (
                step_ratio(self.reference_grid, layout, (axis,), "a reference grid of the rotary embedding")
                for axis in (0, 1)
            )
            axes = (h * rows, w * columns)
        num_frequencies = self.head_dim // (2 * len(axes))
        exponents = torch.linspace(0, 1, num_frequencies, device=like.device, dtype=dtype)
        frequencies = 10000.0**-exponents
        angles = torch.cat([axis[..., None] * frequencies for axis in axes], dim=-1)  # (H*W, d/2)
        return F.pad(angles, (0, 0, layout.num_prefix_tokens, 0))


def _turns(angles: Tensor) -> tuple[Tensor, ...]:
    """cos and sin; or the complex numbers that they are, whose product is 2-3 times as fast uncompiled."""
    # A compiler fuses, and knows no complex numbers; nor do those who read what torch.jit.trace records.
    if torch.compiler.is_compiling() or is_jit_tracing():
        return angles.cos(), angles.sin()
    return (torch.polar(torch.ones_like(angles), angles),)


def _turn(x: Tensor, turns: tuple[Tensor, ...]) -> Tensor:
    """(x_2m, x_2m+1) -> (x_2m cos - x_2m+1 sin, x_2m+1 cos + x_2m sin), in the dtype of x."""
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))  # (..., L, d/2, 2)
    if len(turns) == 1:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns[0])
    else:
        (cos, sin), (even, odd) = turns, pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
