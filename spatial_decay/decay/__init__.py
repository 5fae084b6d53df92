"""What is added to the attention scores: numbers of the tokens and pair formulas, no parameters, no backends."""

from typing import TypeAlias

from spatial_decay.decay.axial import AxialDecay
from spatial_decay.decay.base import FactoredDecay, PairwiseDecay, dense, factor, register_factor, score_mod
from spatial_decay.decay.euclidean import EuclideanDecay, alibi_slopes
from spatial_decay.decay.gaussian import GaussianDecay
from spatial_decay.decay.manhattan import ManhattanDecay, fixed_rates
from spatial_decay.decay.path import PathDecay
from spatial_decay.decay.squared import SquaredDecay

Decay: TypeAlias = PairwiseDecay | AxialDecay
"""Any description of a decay: one pair formula over all tokens, or the arrangement of two, rows and columns."""

__all__ = [
    "AxialDecay",
    "Decay",
    "EuclideanDecay",
    "FactoredDecay",
    "GaussianDecay",
    "ManhattanDecay",
    "PairwiseDecay",
    "PathDecay",
    "SquaredDecay",
    "alibi_slopes",
    "dense",
    "factor",
    "fixed_rates",
    "register_factor",
    "score_mod",
]
