"""Pictures of maps over the tokens: gates, decay and attention of a layer, kinds side by side, reach over the photo."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from torch import Tensor

from spatial_decay.viz.measures import reach
from spatial_decay.viz.panels import Block, Strip, draw_blocks, linear_scale, log_scale, show_map
from spatial_decay.viz.records import LayerRecord

__all__ = ["plot_decay_maps", "plot_kinds", "plot_reach", "plot_with_and_without_decay"]

Query = tuple[int, int, int]
"""(image, h, w): number in the batch, row and column on the layer's grid."""


def plot_decay_maps(
    layer: LayerRecord, images: Tensor, queries: Sequence[Query], *, heads: Sequence[int] | None = None
) -> Figure:
    """Gates, decay and attention of one layer: a block for each query, which is ringed, a map for each head.

    Decay and attention have logarithmic colour scales over four powers of ten at most: less is as good as nothing.

    Args:
        layer: From record.
        images: What the model saw, (B, C, height, width). 3 channels are colours, other numbers are averaged.
        queries: (image, h, w) each: number in the batch, row and column on the layer's grid.
        heads: Which to show, by number. None: all.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no queries or heads, or one that is not there.

    Examples:
        >>> from spatial_decay.viz import record
        >>> (layer,) = record(SpatialDecayAttention(64, 4), torch.randn(1, 6, 8, 64))
        >>> images = torch.rand(1, 3, 48, 64)
        >>> figure = plot_decay_maps(layer, images, [(0, 2, 5)], heads=[3])
    """
    heads = _heads(layer, heads)
    decay, attention = _of_queries(layer, queries, heads)
    scales = log_scale(decay, highest=1.0), log_scale(attention)
    names, gates = _names(heads), layer.gates()
    blocks = []
    for i, (image, h, w) in enumerate(queries):
        strips = [
            Strip(
                name.replace("_", " "),
                "G, nats\nper grid step",
                gate[image, heads],
                names,
                "viridis",
                linear_scale(gate[[query[0] for query in queries]][:, heads]),
            )
            for name, gate in gates.items()
        ]
        strips.append(Strip("decay", "exp(M), factor\non the weight", decay[i], names, "magma", scales[0]))
        strips.append(Strip("attention", "weight", attention[i], names, "cividis", scales[1]))
        blocks.append(Block(images[image], f"image {image}\nquery ({h}, {w})", (h, w), strips))
    return draw_blocks(blocks, _title(layer))


def plot_with_and_without_decay(
    layer: LayerRecord, images: Tensor, queries: Sequence[Query], *, heads: Sequence[int] | None = None
) -> Figure:
    """What the decay does to attention: the softmax of the same scores without it, the decay, and both together.

    Args:
        layer: From record.
        images: (B, C, height, width), as in plot_decay_maps.
        queries: As in plot_decay_maps.
        heads: As in plot_decay_maps.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no queries or heads, or one that is not there.
    """
    heads = _heads(layer, heads)
    plain = _of_queries(layer.without_decay(), queries, heads)[1]
    decay, attention = _of_queries(layer, queries, heads)
    scales = log_scale(torch.stack([plain, attention])), log_scale(decay, highest=1.0)
    names = _names(heads)
    blocks = []
    for i, (image, h, w) in enumerate(queries):
        strips = [
            Strip("without decay", "weight", plain[i], names, "cividis", scales[0]),
            Strip("decay", "exp(M), factor", decay[i], names, "magma", scales[1]),
            Strip("with decay", "weight", attention[i], names, "cividis", scales[0]),
        ]
        blocks.append(Block(images[image], f"image {image}\nquery ({h}, {w})", (h, w), strips))
    return draw_blocks(blocks, _title(layer))


def plot_kinds(layers: Sequence[LayerRecord], images: Tensor, query: Query, *, head: int = 0) -> Figure:
    """One query under every kind: decay and attention, a column for each layer.

    Both are drawn as parts of their largest values: kind `gaussian` adds to scores where others take from them, and a
    narrow kind gives a few keys much more than a wide one gives any.

    Args:
        layers: From record: one of each kind, or of each model, with the same grid.
        images: (B, C, height, width), as in plot_decay_maps.
        query: (image, h, w), as in plot_decay_maps.
        head: Which head of each.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no layers; grids that differ; a query or head that is not there.
    """
    if not layers or len({layer.layout.size for layer in layers}) > 1:
        sizes = sorted({layer.layout.size for layer in layers})
        raise ValueError(f"layers must be one or more, with grids of one size: got {len(layers)} with {sizes}.")
    image, h, w = query
    maps = [_of_queries(layer, [query], [head]) for layer in layers]
    decay = torch.stack([decay[0, 0] / decay.max().clamp_min(1e-30) for decay, _ in maps])
    attention = torch.stack([attention[0, 0] / attention.max().clamp_min(1e-30) for _, attention in maps])
    names = [layer.kind.name for layer in layers]
    strips = [
        Strip("decay", "exp(M), part\nof the largest", decay, names, "magma", log_scale(decay)),
        Strip("attention", "weight, part\nof the largest", attention, names, "cividis", log_scale(attention)),
    ]
    height, width = layers[0].layout.size
    title = f"one query under {len(layers)} kinds of decay, head {head}, {height} x {width} tokens, query ringed"
    return draw_blocks([Block(images[image], f"image {image}\nquery ({h}, {w})", (h, w), strips)], title, max_columns=4)


def plot_reach(
    layers: Sequence[LayerRecord],
    images: Tensor,
    *,
    image: int = 0,
    heads: Sequence[int] | None = None,
    share: float = 0.5,
    ax: Axes | None = None,
) -> Figure:
    """Over the photo, within how many grid steps a share of each patch's attention lies: layers x heads.

    Args:
        layers: From record; each has a colour scale of its own. Of `[layer.decay_alone() for layer in layers]` it is
            what the decay alone reaches.
        images: (B, C, height, width), as in plot_decay_maps.
        image: Number in the batch.
        heads: Which to show, by number. None: all of each layer.
        share: As in reach.
        ax: Draw here, one layer and one head, rather than in a figure of its own.

    Returns:
        The figure, for figure.savefig(path).

    Raises:
        ValueError: no layers or heads, or one that is not there; more than one map for ax; share is out of range.

    Examples:
        >>> from spatial_decay.viz import record
        >>> layers = record(SpatialDecayAttention(64, 4), torch.randn(1, 6, 8, 64))
        >>> figure = plot_reach(layers, torch.rand(1, 3, 48, 64), heads=[3])
    """
    if not layers:
        raise ValueError("layers must be one record or more: got none.")
    shown = [_heads(layer, heads) for layer in layers]
    maps = [reach(layer.select([image], chosen), share)[0] for layer, chosen in zip(layers, shown, strict=True)]
    unit = f"grid steps to {share:.0%}\nof the attention"
    if ax is not None:
        if len(maps) > 1 or len(maps[0]) > 1:
            count = sum(map(len, maps))
            raise ValueError(f"ax has room for one map: got {count}. Choose a layer and a head, or leave ax out.")
        heat = show_map(ax, maps[0][0], "viridis", linear_scale(maps[0]), images[image])
        figure = ax.get_figure(root=True)
        assert isinstance(figure, Figure)
        figure.colorbar(ScalarMappable(heat.norm, heat.cmap), ax=ax, label=unit)  # opaque, as the map is not
        return figure
    strips = [
        Strip(layer.name, unit, values, _names(chosen), "viridis", linear_scale(values), is_over_photo=True)
        for layer, values, chosen in zip(layers, maps, shown, strict=True)
    ]
    title = f"reach: grid steps within which {share:.0%} of a patch's attention lies"
    return draw_blocks([Block(images[image], f"image {image}", None, strips)], title)


def _heads(layer: LayerRecord, heads: Sequence[int] | None) -> list[int]:
    return list(range(layer.q.shape[1]) if heads is None else heads)


def _names(heads: Sequence[int]) -> list[str]:
    return [f"head {head}" for head in heads]


def _of_queries(layer: LayerRecord, queries: Sequence[Query], heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Decay and attention of each query, (queries, heads, H, W) each."""
    num_images = layer.q.shape[0]
    if not queries or any(not 0 <= image < num_images for image, _, _ in queries):
        raise ValueError(f"queries must be (image, h, w), one or more, of {num_images} images: got {list(queries)}.")
    parts = [(layer.select([image], heads), (h, w)) for image, h, w in queries]
    decay = torch.stack([part.decay(query)[0] for part, query in parts])
    attention = torch.stack([part.attention(query)[0] for part, query in parts])
    return decay, attention


def _title(layer: LayerRecord) -> str:
    height, width = layer.layout.size
    return f"{layer.name}: decay {layer.kind.name!r}, {height} x {width} tokens, query ringed"
