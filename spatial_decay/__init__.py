"""Attention with spatial decay for vision: "Learning Spatial Decay for Vision Transformers" (Mao et al. 2025)."""

from spatial_decay.decay import AxialDecay, ManhattanDecay, PathDecay
from spatial_decay.grid import Grid
from spatial_decay.layers import ContextAwareGate, SDTBlock, SpatialDecayAttention, SpatialDecayMask
from spatial_decay.models import SDTH, sdt_h_base, sdt_h_small, sdt_h_tiny
from spatial_decay.ops import attention_weights, decay_attention, explain_backend

__version__ = "0.1.0"

__all__ = [
    "SDTH",
    "AxialDecay",
    "ContextAwareGate",
    "Grid",
    "ManhattanDecay",
    "PathDecay",
    "SDTBlock",
    "SpatialDecayAttention",
    "SpatialDecayMask",
    "attention_weights",
    "decay_attention",
    "explain_backend",
    "sdt_h_base",
    "sdt_h_small",
    "sdt_h_tiny",
]
