"""Where the tokens of a sequence lie, on a grid or at positions that fill none, and the steps between them (Eq. 7)."""

from spatial_decay.layout.base import GridSize, Layout, LayoutLike, Steps
from spatial_decay.layout.grid import Grid
from spatial_decay.layout.positions import Positions

__all__ = ["Grid", "GridSize", "Layout", "LayoutLike", "Positions", "Steps"]
