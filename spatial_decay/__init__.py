"""Attention with spatial decay for vision: "Learning Spatial Decay for Vision Transformers" (Mao et al. 2025).

| names | what they are for |
|---|---|
| `swap_attention`, `restore_attention`, `save_swapped`, `load_swapped` | decay in the ViT or DiT that you have |
| `SpatialDecayAttention`, `SDTBlock`, `SpatialDecayMask`, `ContextAwareGate` | layers for your own model |
| `decay_attention`, `explain_backend`, `Grid`, `Positions` | attention with a decay of your own |
| `SDTH`, `sdt_h_*`, `SDTP`, `sdt_p_*`, `ViT`, `list_models`, `load_checkpoint` | backbones, and their weights |

Modules: `kinds` (kinds of decay with their options), `decay` (what is added to the scores), `layers`, `models` (with
the peers RMT and LocAtViT), `ops` (backends, attention_weights), `swap` (register_attention, for attention classes of
your own); and `integrations` and `viz`, imported when asked for.
"""

from spatial_decay import decay, layers, models, ops
from spatial_decay.checkpoint import load_checkpoint
from spatial_decay.layers import ContextAwareGate, SDTBlock, SpatialDecayAttention, SpatialDecayMask, kinds
from spatial_decay.layout import Grid, Positions
from spatial_decay.models import (
    SDTH,
    SDTP,
    ViT,
    list_models,
    sdt_h_base,
    sdt_h_small,
    sdt_h_tiny,
    sdt_p_base,
    sdt_p_large,
    sdt_p_small,
    sdt_p_xlarge,
)
from spatial_decay.ops import decay_attention, explain_backend
from spatial_decay.swap import load_swapped, restore_attention, save_swapped, swap_attention

__version__ = "0.1.0"

__all__ = [
    "SDTH",
    "SDTP",
    "ContextAwareGate",
    "Grid",
    "Positions",
    "SDTBlock",
    "SpatialDecayAttention",
    "SpatialDecayMask",
    "ViT",
    "decay",
    "decay_attention",
    "explain_backend",
    "kinds",
    "layers",
    "list_models",
    "load_checkpoint",
    "load_swapped",
    "models",
    "ops",
    "restore_attention",
    "save_swapped",
    "sdt_h_base",
    "sdt_h_small",
    "sdt_h_tiny",
    "sdt_p_base",
    "sdt_p_large",
    "sdt_p_small",
    "sdt_p_xlarge",
    "swap_attention",
]
