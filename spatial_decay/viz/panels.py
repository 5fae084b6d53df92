"""How maps over the tokens of an image are laid out and drawn: strips of maps beside the image, a ring at the query."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle
from torch import Tensor

__all__ = ["Block", "Strip", "draw_blocks", "linear_scale", "log_scale", "ring", "show_map", "show_photo"]

MAX_COLUMNS = 8
"""Maps side by side; more go on in the next line, so that a page shows them in a size that can be read."""

_WIDTH = 6.4  # inches of the maps of a line together
_PHOTO_WIDTH = 1.5
_TITLE_HEIGHT = 0.25


@dataclass(frozen=True)
class Strip:
    """Maps that share a colour scale.

    Args:
        title: What they show.
        unit: Of the colour bar.
        maps: (number of maps, H, W).
        names: One for each map.
        cmap: Of matplotlib.
        norm: The colour scale.
        is_over_photo: Draw them over a grey copy of the image.
    """

    title: str
    unit: str
    maps: Tensor
    names: Sequence[str]
    cmap: str
    norm: Normalize
    is_over_photo: bool = False


@dataclass(frozen=True)
class Block:
    """An image and the strips that belong to it.

    Args:
        image: (C, height, width).
        label: Over the image.
        query: (h, w) to be ringed on each map and on the image; None: nothing.
        strips: From top to bottom.
    """

    image: Tensor
    label: str
    query: tuple[int, int] | None
    strips: Sequence[Strip]


def draw_blocks(blocks: Sequence[Block], title: str, *, max_columns: int = MAX_COLUMNS) -> Figure:
    """A figure of blocks below each other: the image at the left, its strips in lines of maps, their colour bars."""
    columns = min(max_columns, max(len(strip.maps) for block in blocks for strip in block.strips))
    map_width = min(2.2, _WIDTH / columns)
    lines = [[-(-len(strip.maps) // columns) for strip in block.strips] for block in blocks]
    heights = [
        map_width * strip.maps.shape[1] / strip.maps.shape[2] + _TITLE_HEIGHT
        for block, counts in zip(blocks, lines, strict=True)
        for strip, count in zip(block.strips, counts, strict=True)
        for _ in range(count)
    ]
    widths = [_PHOTO_WIDTH, *[map_width] * columns, 0.12]
    figure = Figure((sum(widths) + 0.9, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    cells = figure.add_gridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    row = 0
    for block, counts in zip(blocks, lines, strict=True):
        ax = figure.add_subplot(cells[row : row + sum(counts), 0], anchor="N")
        ax.set_title(block.label, fontsize="medium")
        show_photo(ax, block.image, block.strips[0].maps.shape[1:])
        _ring_query(ax, block)
        for strip, count in zip(block.strips, counts, strict=True):
            for i, values in enumerate(strip.maps):
                line, column = divmod(i, columns)
                ax = figure.add_subplot(cells[row + line, 1 + column])
                ax.set_title(strip.names[i], fontsize="small", pad=3)
                if i == 0:
                    ax.set_ylabel(strip.title, fontsize="small")
                show_map(ax, values, strip.cmap, strip.norm, block.image if strip.is_over_photo else None)
                _ring_query(ax, block)
            bar_ax = figure.add_subplot(cells[row : row + count, -1])
            ticks = [strip.norm.inverse(place) for place in (0.0, 0.5, 1.0)]
            bar = figure.colorbar(ScalarMappable(strip.norm, strip.cmap), bar_ax, ticks=ticks, format="%.2g")
            bar.minorticks_off()
            bar.ax.tick_params(labelsize="small")
            bar.set_label(strip.unit, fontsize="small")
            row += count
    return figure


def show_photo(ax: Axes, image: Tensor, size: Sequence[int], *, is_grey: bool = False) -> None:
    """The image (C, height, width), spread over the grid (H, W), so that tokens are in their places; no ticks.

    3 channels are colours, other numbers are averaged.
    """
    height, width = size
    image = image.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    picture: Any = image.mean(0) if is_grey or len(image) != 3 else image.permute(1, 2, 0)
    ax.imshow(picture.numpy(), cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    ax.set(xticks=[], yticks=[])


def show_map(ax: Axes, values: Tensor, cmap: str, norm: Normalize, image: Tensor | None = None) -> AxesImage:
    """A map (H, W), over a grey copy of the image where one is given; no ticks."""
    if image is not None:
        show_photo(ax, image, values.shape, is_grey=True)
    heat = ax.imshow(values.float().cpu().numpy(), cmap=cmap, norm=norm, alpha=None if image is None else 0.7)
    ax.set(xticks=[], yticks=[])
    return heat


def ring(ax: Axes, query: tuple[int, int], size: Sequence[int]) -> list[Circle]:
    """Mark the query by a ring as large as its patch, or larger where a patch is too small to be seen."""
    h, w = query
    radius = max(0.5, 0.035 * max(size))
    circles = [
        Circle((w, h), radius, fill=False, edgecolor=colour, linewidth=line_width, clip_on=False)
        for colour, line_width in (("white", 2.6), ("red", 1.3))  # legible on dark and on light
    ]
    for circle in circles:
        ax.add_patch(circle)
    return circles


def _ring_query(ax: Axes, block: Block) -> None:
    if block.query is not None:
        ring(ax, block.query, block.strips[0].maps.shape[1:])


def linear_scale(values: Tensor) -> Normalize:
    """From the smallest to the largest value, nan aside."""
    values = values[values.isfinite()]
    return Normalize(values.min().item(), values.max().item()) if len(values) else Normalize(0.0, 1.0)


def log_scale(values: Tensor, *, highest: float = 0.0, decades: float = 4.0) -> LogNorm:
    """Up to the largest value, or to `highest` where that is more, from at most so many powers of ten below; what is
    less has the last colour. One decade at least, so that what hardly differs is drawn alike.
    """
    top = max(highest, values.max().item(), 1e-30)
    bottom = min(max(values.min().item(), top / 10**decades), top / 10)
    return LogNorm(bottom, top, clip=True)
