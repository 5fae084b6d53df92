"""Attention with spatial decay for vision: "Learning Spatial Decay for Vision Transformers" (Mao et al. 2025)."""

from spatial_decay.checkpoint import CheckpointReport, load_checkpoint
from spatial_decay.decay import AxialDecay, GaussianDecay, ManhattanDecay, PathDecay
from spatial_decay.grid import Grid
from spatial_decay.layers import (
    ContextAwareGate,
    GaussianGate,
    PatchRepresentationRefinement,
    SDTBlock,
    SpatialDecayAttention,
    SpatialDecayMask,
)
from spatial_decay.models import (
    SDTH,
    SDTP,
    ViT,
    locatvit_base,
    locatvit_small,
    locatvit_tiny,
    rmt_base,
    rmt_large,
    rmt_small,
    rmt_tiny,
    sdt_h_base,
    sdt_h_small,
    sdt_h_tiny,
    sdt_p_base,
    sdt_p_large,
    sdt_p_small,
    sdt_p_xlarge,
)
from spatial_decay.ops import attention_weights, decay_attention, explain_backend
from spatial_decay.positions import Positions
from spatial_decay.swap import SwapReport, load_swapped, restore_attention, save_swapped, swap_attention

__version__ = "0.1.0"

__all__ = [
    "SDTH",
    "SDTP",
    "AxialDecay",
    "CheckpointReport",
    "ContextAwareGate",
    "GaussianDecay",
    "GaussianGate",
    "Grid",
    "ManhattanDecay",
    "PatchRepresentationRefinement",
    "PathDecay",
    "Positions",
    "SDTBlock",
    "SpatialDecayAttention",
    "SpatialDecayMask",
    "SwapReport",
    "ViT",
    "attention_weights",
    "decay_attention",
    "explain_backend",
    "load_checkpoint",
    "load_swapped",
    "locatvit_base",
    "locatvit_small",
    "locatvit_tiny",
    "restore_attention",
    "rmt_base",
    "rmt_large",
    "rmt_small",
    "rmt_tiny",
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
