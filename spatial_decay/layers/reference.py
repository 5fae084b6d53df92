"""Steps of the grid that a model is trained on, on grids of other sizes: for distances, and for rotary angles."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spatial_decay.layout import Layout, Positions

__all__ = ["as_reference_grid", "shrunk", "step_ratio"]


def as_reference_grid(size: Sequence[int], name: str = "reference_grid") -> tuple[int, int]:
    """(H0, W0), checked.

    Args:
        size: What the user said.
        name: Of the option, for the error.

    Returns:
        Two whole numbers.

    Raises:
        ValueError: they are not two whole numbers >= 1.
    """
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not is_pair or not all(type(n) is int and n >= 1 for n in size):
        raise ValueError(f"{name} must be (H, W), two whole numbers >= 1: got {size!r}.")
    return size[0], size[1]


def shrunk(reference_grid: Sequence[int] | None, shrink: int) -> tuple[int, int] | None:
    """The grid of a map that is so many times as small, as convolutions with stride 2 leave it: each n becomes ceil.

    Args:
        reference_grid: (H0, W0), or None.
        shrink: How many times.

    Returns:
        (ceil(H0 / shrink), ceil(W0 / shrink)); None where there is none.
    """
    if reference_grid is None:
        return None
    height, width = as_reference_grid(reference_grid, "rope_reference_grid")
    return -(-height // shrink), -(-width // shrink)


def step_ratio(reference_grid: Sequence[int], layout: Layout, axes: tuple[int, ...], what: str) -> Any:
    """What a step of this grid is of a step of the reference grid: H0 / H, W0 / W, or (H0 + W0) / (H + W) of both.

    Args:
        reference_grid: (H0, W0).
        layout: Where the tokens lie.
        axes: 0 for the height, 1 for the width.
        what: What asks, for the error.

    Returns:
        A number; a float64 tensor to torch.jit.trace, to which sizes are tensors.

    Raises:
        ValueError: the layout is neither a grid nor Positions that are part of one.
    """
    size = layout.grid_size if isinstance(layout, Positions) else None
    if size is None:
        remedy = (
            "Leave it out; or, for Positions of your own, say their grid_size, or give them in steps of the reference "
            "grid, h * H0 / H and w * W0 / W."
        )
        size = layout.as_grid(what, remedy).size
    length: Any = sum(size[axis] for axis in axes)
    if isinstance(length, Tensor):
        length = length.double()  # and divides as Python does
    return sum(reference_grid[axis] for axis in axes) / length
