"""A Gaussian around each query, as wide and as high as the query says: LocAtViT (`gaussian`)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spatial_decay.decay.base import Numbers, PairwiseDecay
from spatial_decay.layout import Layout

__all__ = ["GaussianDecay"]


@dataclass(frozen=True)
class GaussianDecay(PairwiseDecay):
    """M[i, j] = a_i * exp(-((h_i - h_j)^2 / s_h,i + (w_i - w_j)^2 / s_w,i) / 2), LocAtViT's addition to the scores.

    Unlike the other decays it is >= 0: it lifts what is near where they lower what is far.

    Args:
        amplitude: a, (B, N, L), nats; B may be 1, here and below. Values at prefix tokens are not used.
        variance_h: s_h, (B, N, L), > 0, in square grid steps.
        variance_w: s_w, the same along the width.
        layout: Where the L tokens lie.
        max_distance: Distances along an axis count as this at most, in grid steps: LocAtViT's clamp.
    """

    amplitude: Tensor
    variance_h: Tensor
    variance_w: Tensor
    layout: Layout
    max_distance: float = math.inf

    def pairwise(self, query: Numbers, key: Numbers, *steps: Tensor) -> Tensor:  # noqa: ARG002  the query says it all
        decay, *variances = query
        for step, variance in zip(steps, variances, strict=True):
            decay = decay * torch.exp(self.exponent(step, variance))  # a product: H + W exponentials a query on a grid
        return decay

    def exponent(self, step: Tensor, variance: Tensor) -> Tensor:
        """-step^2 / (2 s), the logarithm of the factor along one axis.

        Args:
            step: Differences of position along the axis, in grid steps.
            variance: s along the axis, > 0, in square grid steps.

        Returns:
            Nats, <= 0, in the shape to which the two broadcast.
        """
        return step.abs().clamp(max=self.max_distance).square() / (-2 * variance)
