"""Pictures of what decay does in a model: gates, decay, attention and its reach (SDT Eq. 4-13), and training curves.

`record` works for every attention of this package: layers, backbones, swapped models, timm's attn_layer=. What it
returns is data; `reach`, `attention_distance` and `gate_statistics` are numbers made of it, the plots draw them.

Needs the extra: pip install "spatial-decay[viz]". Figures are drawn without pyplot: no display, no global state,
nothing to close. They take their colours from matplotlib's style, a dark one too.
"""

try:
    import matplotlib  # noqa: F401  only to see that it is there
except ImportError as error:
    raise ImportError(
        'spatial_decay.viz needs matplotlib 3.8 or newer. Install it: pip install "spatial-decay[viz]"'
    ) from error

from spatial_decay.viz.animation import animate_query
from spatial_decay.viz.curves import plot_attention_distance, plot_training_curve
from spatial_decay.viz.maps import plot_decay_maps, plot_kinds, plot_reach, plot_with_and_without_decay
from spatial_decay.viz.measures import attention_distance, gate_statistics, reach
from spatial_decay.viz.records import LayerRecord, record

__all__ = [
    "LayerRecord",
    "animate_query",
    "attention_distance",
    "gate_statistics",
    "plot_attention_distance",
    "plot_decay_maps",
    "plot_kinds",
    "plot_reach",
    "plot_training_curve",
    "plot_with_and_without_decay",
    "reach",
    "record",
]
