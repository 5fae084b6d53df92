"""The figures: gates, decay maps and attention of one layer, and training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from spatial_decay.viz.records import LayerRecord

__all__ = ["plot_decay_maps", "plot_training_curve"]


@dataclass(frozen=True)
class _Panel:
    """Maps that share a colour scale: a row for each query, a column for each head."""

    title: str
    unit: str
    maps: Tensor  # (queries, heads, H, W)
    cmap: str
    norm: Normalize


def plot_decay_maps(
    layer: LayerRecord,
    images: Tensor,
    queries: Sequence[tuple[int, int, int]],
    *,
    heads: Sequence[int] | None = None,
) -> Figure:
    """Gates, decay and attention of one layer: a row for each query, which is ringed, a column for each head.

    Args:
        layer: From record.
        images: What the model saw, (B, C, height, width). 3 channels are colours, other numbers are averaged.
        queries: (image, h, w) each: number in the batch, row and column on the layer's grid.
        heads: Which to show. None: all.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no queries or heads, or one that is not there.
    """
    (num_images, num_heads), (height, width) = layer.q.shape[:2], layer.layout.size
    shown = list(range(num_heads) if heads is None else heads)
    if not queries or any(not 0 <= image < num_images for image, _, _ in queries):
        raise ValueError(f"queries must be (image, h, w), one or more, of {num_images} images: got {list(queries)}.")
    if not shown or any(not 0 <= head < num_heads for head in shown):
        raise ValueError(f"heads must be numbers from 0 to {num_heads - 1}, one or more: got {shown}.")
    panels = _panels(layer, queries, shown)
    widths = [1.0] + ([0.15] + [1.0] * len(shown)) * len(panels)  # the input; a gap and the heads of each panel
    heights = [1.0] * len(queries) + [0.08]  # the queries; colour bars
    size = (1.35 * sum(widths) + 0.4, 1.35 * height / width * len(queries) + 1.7)  # inches
    figure = Figure(size, layout="constrained")
    figure.suptitle(f"{layer.name}\ndecay {layer.kind.name!r}, {height} x {width} tokens, query ringed")
    cells = figure.add_gridspec(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    for row, (image, h, w) in enumerate(queries):
        ax = figure.add_subplot(cells[row, 0], ylabel=f"image {image}\nquery ({h}, {w})", title="" if row else "input")
        # The image spans the grid, so that the ring is in its place.
        ax.imshow(_as_picture(images[image]), cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        _ring(ax, h, w)
    for i, panel in enumerate(panels):
        first = 2 + i * (1 + len(shown))
        for row, (_, h, w) in enumerate(queries):
            for column, head in enumerate(shown):
                title = "" if row else f"{panel.title}\nhead {head}"
                ax = figure.add_subplot(cells[row, first + column], title=title)
                heat = ax.imshow(panel.maps[row, column].float().cpu().numpy(), cmap=panel.cmap, norm=panel.norm)
                _ring(ax, h, w)
        bar_ax = figure.add_subplot(cells[-1, first : first + len(shown)])
        ticks = [panel.norm.inverse(place) for place in (0.0, 0.5, 1.0)]
        figure.colorbar(heat, bar_ax, orientation="horizontal", label=panel.unit, ticks=ticks, format="%.2g")
    return figure


def _panels(layer: LayerRecord, queries: Sequence[tuple[int, int, int]], heads: list[int]) -> list[_Panel]:
    """What there is to draw, left to right."""
    images = [image for image, _, _ in queries]
    gates = {name: gate[images][:, heads] for name, gate in layer.gates().items()}
    decay = torch.stack([layer.decay((h, w))[image, heads] for image, h, w in queries])
    attention = torch.stack([layer.attention((h, w))[image, heads] for image, h, w in queries])
    return [
        *(
            _Panel(
                name.replace("_", "\n"),
                "G, nats\nper grid step",
                maps,
                "viridis",
                Normalize(maps.min().item(), maps.max().item()),
            )
            for name, maps in gates.items()
        ),
        _Panel("decay", "exp(M), factor\non the weight", decay, "magma", Normalize(0, max(1.0, decay.max().item()))),
        # The root shows spread-out rows next to one with a peak.
        _Panel("attention", "weight,\nroot scale", attention, "cividis", PowerNorm(0.5, 0, attention.max().item())),
    ]


def _ring(ax: Axes, h: int, w: int) -> None:
    """Mark the query, legible on dark and on light; no ticks."""
    for colour, line_width in (("white", 3.0), ("red", 1.5)):
        ax.plot(w, h, "o", markersize=8, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=line_width)
    ax.set(xticks=[], yticks=[])


def _as_picture(image: Tensor) -> Any:
    """(C, height, width) -> what imshow takes, in [0, 1]."""
    image = image.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return (image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)).numpy()


def plot_training_curve(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """What was measured at the end of each epoch: a panel for each unit, a line for each quantity.

    Args:
        curves: Label of the vertical axis, with its unit -> name of the line -> one value an epoch.

    Returns:
        The figure, for figure.savefig(path).
    """
    figure = Figure(figsize=(5.0 * len(curves), 3.6), layout="constrained")
    for ax, (label, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, marker=".", label=f"{name}, last {values[-1]:.4g}")
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.legend()
    return figure
