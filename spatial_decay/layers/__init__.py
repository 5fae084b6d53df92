"""The modules: from features to decays, attention and blocks."""

from spatial_decay.layers import kinds
from spatial_decay.layers.attention import AttentionOptions, SpatialDecayAttention
from spatial_decay.layers.block import SDTBlock
from spatial_decay.layers.core import AttentionCore
from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.gate import ContextAwareGate
from spatial_decay.layers.gaussian import GaussianGate
from spatial_decay.layers.mask import SpatialDecayMask
from spatial_decay.layers.mlp import ConvMlp
from spatial_decay.layers.output_gate import OutputGate
from spatial_decay.layers.patch import ConvStem, Downsample, PatchEmbed
from spatial_decay.layers.rates import TrainedRates
from spatial_decay.layers.refinement import PatchRepresentationRefinement
from spatial_decay.layers.residual import DropPath, LayerScale
from spatial_decay.layers.rotary import RotaryEmbedding

__all__ = [
    "AttentionCore",
    "AttentionOptions",
    "ContextAwareGate",
    "ConvMlp",
    "ConvStem",
    "DepthwiseConv",
    "Downsample",
    "DropPath",
    "GaussianGate",
    "LayerScale",
    "OutputGate",
    "PatchEmbed",
    "PatchRepresentationRefinement",
    "RotaryEmbedding",
    "SDTBlock",
    "SpatialDecayAttention",
    "SpatialDecayMask",
    "TrainedRates",
    "kinds",
]
