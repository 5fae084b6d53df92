"""A query that moves over the image, and its decay and attention at each place (SDT Eq. 9-10)."""

from collections.abc import Sequence

import torch
from matplotlib.animation import FuncAnimation
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from spatial_decay.viz.panels import log_scale, ring, show_map, show_photo
from spatial_decay.viz.records import LayerRecord

__all__ = ["animate_query"]


def animate_query(
    layer: LayerRecord,
    images: Tensor,
    path: Sequence[tuple[int, int]],
    *,
    image: int = 0,
    head: int = 0,
    interval: int = 150,
) -> FuncAnimation:
    """The image with a ring at the query, the decay and the attention of one head, a frame for each place.

    Args:
        layer: From record.
        images: What the model saw, (B, C, height, width). 3 channels are colours, other numbers are averaged.
        path: (h, w), row and column on the layer's grid, one or more.
        image: Number in the batch.
        head: Which head.
        interval: Milliseconds a frame.

    Returns:
        The animation. `animation.save("query.gif", writer="pillow")` writes it, `animation.to_jshtml()` is for a
        notebook. Matplotlib warns about one that is thrown away unused.

    Raises:
        ValueError: no path, or a place, image or head that is not there.
    """
    if not path:
        raise ValueError("path must be one (h, w) or more: got none.")
    part = layer.select([image], [head])
    decay = torch.stack([part.decay(query)[0, 0] for query in path])
    attention = torch.stack([part.attention(query)[0, 0] for query in path])
    height, width = part.layout.size
    figure = Figure((9.0, 2.7 * height / width + 0.9), layout="constrained")
    figure.suptitle(f"{layer.name}: decay {layer.kind.name!r}, head {head}", fontsize="medium")
    photo_ax, *axes = figure.subplots(1, 3)
    show_photo(photo_ax, images[image], part.layout.size)
    photo_ax.set_title("query", fontsize="small")
    norms = log_scale(decay, highest=1.0), log_scale(attention)
    heats = []
    for ax, values, title, cmap, norm in zip(
        axes, (decay, attention), ("decay, exp(M)", "attention"), ("magma", "cividis"), norms, strict=True
    ):
        heats.append(show_map(ax, values[0], cmap, norm))
        ax.set_title(title, fontsize="small")
    circles = [circle for ax in (photo_ax, *axes) for circle in ring(ax, path[0], part.layout.size)]

    def show(frame: int) -> list[Artist]:
        for heat, values in zip(heats, (decay, attention), strict=True):
            heat.set_data(values[frame].float().cpu().numpy())
        h, w = path[frame]
        for circle in circles:
            circle.center = (w, h)
        return [*heats, *circles]

    return FuncAnimation(figure, show, frames=len(path), interval=interval)
