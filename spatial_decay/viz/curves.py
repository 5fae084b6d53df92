"""Curves: how far attention reaches by depth and head, and what was measured while a model was trained."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spatial_decay.viz.measures import attention_distance
from spatial_decay.viz.records import LayerRecord

__all__ = ["plot_attention_distance", "plot_training_curve"]


def plot_attention_distance(layers: Sequence[LayerRecord], *, label: str = "attention", ax: Axes | None = None) -> Axes:
    """How far attention reaches on average, by depth: a dot for each head, a line through their means.

    Args:
        layers: From record; the mean is over all images and queries, see attention_distance. Where the grids of a
            model differ, so do their steps.
        label: Of the line. Draw `[layer.without_decay() for layer in layers]` into the same ax to compare.
        ax: Draw here. None: in a figure of its own.

    Returns:
        The axes; ax.figure.savefig(path) saves them.

    Raises:
        ValueError: no layers.
    """
    if not layers:
        raise ValueError("layers must be one record or more: got none.")
    if ax is None:
        ax = Figure((5.0, 3.6), layout="constrained").subplots()
    distances = [attention_distance(layer).nanmean(0).tolist() for layer in layers]  # one a head
    depths = range(1, len(layers) + 1)
    (line,) = ax.plot(depths, [sum(heads) / len(heads) for heads in distances], linewidth=2, label=label)
    for depth, heads in zip(depths, distances, strict=True):
        ax.plot([depth] * len(heads), heads, "o", markersize=5, alpha=0.5, color=line.get_color())
    ax.set(xlabel="layer", ylabel="mean distance of attention (grid steps)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0, auto=True)  # the next line may reach higher
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


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
