"""Pictures of what decay does in a model: gates, decay maps and attention (SDT Eq. 5-13), and training curves.

`record` works for every attention of this package: layers, backbones, swapped models, timm's attn_layer=. Needs the
extra [viz]. Figures are drawn without pyplot: no display, no global state, nothing to close.
"""

from spatial_decay.viz.figures import plot_decay_maps, plot_training_curve
from spatial_decay.viz.records import LayerRecord, record

__all__ = ["LayerRecord", "plot_decay_maps", "plot_training_curve", "record"]
