"""Pictures of what decay does in a model: gates, decay maps and attention (SDT Eq. 5-13), and training curves.

Needs the extra [viz]. Figures are drawn without pyplot: no display, no global state, nothing to close.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from spatial_decay.grid import Grid, GridSize, as_tokens, tokens_to_map
from spatial_decay.layers import ContextAwareGate, SpatialDecayAttention
from spatial_decay.positions import Positions
from spatial_decay.precision import at_least_float32

__all__ = ["LayerRecord", "plot_decay_maps", "plot_training_curve", "record"]


@dataclass(frozen=True)
class LayerRecord:
    """What one attention layer saw, and the maps that follow from it, computed when they are asked for.

    Maps are (B, N, H, W) over the patch tokens, without prefix tokens. They come from the parameters that the layer
    has by then: look before you train on.

    Args:
        name: Of the layer in its model.
        layer: The layer.
        tokens: Its input, (B, L, D).
        grid: The grid of the L tokens.
        attn_mask: As in the layer's call.
    """

    name: str
    layer: SpatialDecayAttention
    tokens: Tensor
    grid: Grid
    attn_mask: Tensor | None = None

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """G of each gate of the kind, by name: (B, N, H, W), <= 0, nats per grid step. Empty for kinds without one."""
        gates = {name: m for name, m in self.layer.decay.named_children() if isinstance(m, ContextAwareGate)}
        return {name: tokens_to_map(gate(self.tokens), self.grid) for name, gate in gates.items()}

    @torch.no_grad()
    def decay(self, query: tuple[int, int]) -> Tensor:
        """exp(M), the factor by which the decay multiplies the weight of each key: (B, N, H, W).

        In [0, 1]; of kind `gaussian`, which adds to the scores, >= 1.

        For decomposed kinds, of query (h, w) and key (g, u): `exp(M_H[w][h, g] + M_W[g][w, u])`, down the column of the
        query, then along the row of the key. Each of these two has a softmax of its own.

        Args:
            query: (h, w), row and column on the grid; ValueError where it is not.
        """
        self._check(query)
        features = at_least_float32(self.layer.decay_features(self.tokens))
        mask: Tensor | tuple[Tensor, Tensor] | None = self.layer.decay(features, self.grid.size)
        if mask is None:
            return features.new_ones(features.shape[0], self.layer.num_heads, *self.grid.size)
        if not isinstance(mask, tuple):
            return self._row(mask, query).exp()
        (columns, rows), (h, w) = mask, query  # (B, W, N, H, H), (B, H, N, W, W)
        down, along = columns[:, w, :, h, :], rows[:, :, :, w, :].transpose(1, 2)  # (B, N, H), (B, N, H, W)
        return (down[..., None] + along).exp()

    @torch.no_grad()
    def attention(self, query: tuple[int, int]) -> Tensor:
        """The weight that the query gives each patch token: (B, N, H, W), float32 at least.

        Together with the weights of prefix tokens they add up to 1.

        Args:
            query: (h, w), row and column on the grid; ValueError where it is not.
        """
        self._check(query)
        return self._row(self.layer.attention_weights(self.tokens, self.grid.size, self.attn_mask), query)

    def _row(self, matrix: Tensor, query: tuple[int, int]) -> Tensor:
        """The row of one query in (B, N, L, L), as a map (B, N, H, W)."""
        num_prefix = self.grid.num_prefix_tokens
        i = num_prefix + query[0] * self.grid.width + query[1]
        maps: Tensor = matrix[:, :, i, num_prefix:].unflatten(-1, self.grid.size)
        return maps

    def _check(self, query: tuple[int, int]) -> None:
        (h, w), (height, width) = query, self.grid.size
        if not (0 <= h < height and 0 <= w < width):
            raise ValueError(f"query must be (h, w) on the grid of {self.name}, {height} x {width}: got {query}.")


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> list[LayerRecord]:
    """Run the model once and keep what each SpatialDecayAttention saw.

    The model stays in the mode that it is in: in training mode, batch norm and dropout do as in training.

    Args:
        model: Any model that holds SpatialDecayAttention modules.
        images: What model(images) takes.

    Returns:
        One record for each call of such a layer, in the order of the calls.

    Raises:
        ValueError: the model holds no SpatialDecayAttention.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SpatialDecayAttention)}
    if not layers:
        raise ValueError(f"model must hold SpatialDecayAttention modules: got {type(model).__name__} without any.")
    records: list[LayerRecord] = []
    with ExitStack() as hooks:  # removes them again, also where the model raises
        for name, layer in layers.items():
            hook = partial(_keep, records, name or type(layer).__name__)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        model(images)
    return records


def _keep(records: list[LayerRecord], name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook: keep the arguments of layer.forward."""

    def keep(
        x: Tensor,
        grid_size: GridSize | None = None,
        attn_mask: Tensor | None = None,
        positions: Positions | None = None,
    ) -> None:
        if positions is not None:
            raise ValueError(f"pictures need tokens that fill a grid: got Positions in {name}.")
        tokens, grid = as_tokens(x, dim=layer.dim, grid_size=grid_size, num_prefix_tokens=layer.num_prefix_tokens)
        # A copy: the model may go on to change its features in place.
        records.append(LayerRecord(name, layer, tokens.clone(), grid, attn_mask))

    keep(*args, **kwargs)


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
        queries: (image, h, w) each: number in the batch, row and column on the grid of the layer.
        heads: Which to show. None: all.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no queries or heads, or one that is not there.
    """
    num_images, num_heads, (height, width) = len(layer.tokens), layer.layer.num_heads, layer.grid.size
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
    figure.suptitle(f"{layer.name}\ndecay {layer.layer.decay.kind!r}, {height} x {width} tokens, query ringed")
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
            _Panel(name, "G, nats\nper grid step", maps, "viridis", Normalize(maps.min().item(), maps.max().item()))
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
