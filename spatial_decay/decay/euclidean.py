"""Decay with the Euclidean distance: 2-D ALiBi (`alibi`), constant slopes as CROMA has them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import FactoredDecay, check_range, register_factor
from spatial_decay.decay.manhattan import LOWEST, shared_strength
from spatial_decay.decay.squared import squared_distance
from spatial_decay.layout import Layout

__all__ = ["EuclideanDecay", "alibi_slopes", "euclidean_distance"]


_LEAST = 2.0**-60  # a distance below it counts as 0, and there the root has a gradient that is finite, times 0


@register_factor
def euclidean_distance(*steps: Tensor) -> Tensor:
    """sqrt(dh^2 + dw^2) in grid steps; on a grid a sum and a root a pair, the same for all images and heads.

    Its gradient, which only Positions can ask for, counts as 0 where the distance is 0: that of the root is infinite.
    """
    # In place, because to fill fresh memory takes as long as the rest. What is subtracted changes no larger distance.
    return squared_distance(*steps).clamp_(min=_LEAST**2).sqrt_() - _LEAST


@dataclass(frozen=True)
class EuclideanDecay(FactoredDecay):
    """M[i, j] = (a_i + a_j) * sqrt(dh^2 + dw^2).

    With a = -m_n / 2 for all tokens of a head it is ALiBi in two dimensions (Fuller et al. 2023, CROMA).

    Args:
        strength: a, (B, N, L), <= 0, nats per grid step; B may be 1. Its values at prefix tokens are not used.
        layout: Where the L tokens lie.

    Raises:
        ValueError: strength > 0 or below -2 ** 100: infinity times a distance of 0 is NaN. Looked at where that does
            not wait for a GPU: on the CPU, uncompiled.
    """

    strength: Tensor
    layout: Layout

    sign: ClassVar[int] = 1
    factor: ClassVar[str] = "euclidean_distance"

    def __post_init__(self) -> None:
        check_range("strength", self.strength, self.layout, LOWEST, 0.0)

    @classmethod
    def constant(cls, rates: Tensor, layout: Layout) -> Self:
        """-|m_n| times the distance from one slope a head, (N,), nats per grid step.

        Args:
            rates: m_n, (N,), nats per grid step; their sign does not count.
            layout: Where the L tokens lie.

        Returns:
            A decay that all images share.
        """
        return cls(shared_strength(rates, layout), layout)


def alibi_slopes(num_heads: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """ALiBi's slopes m_n = 2 ** (-8 * (n + 1) / N), a geometric series down to 2 ** -8 (Press et al. 2022).

    Where N is no power of two, as in ALiBi and CROMA: the slopes of the largest power P below it, and then every second
    one of the slopes of 2 * P, from the steepest on.

    Args:
        num_heads: N.
        device: Of the slopes.
        dtype: Of the slopes.

    Returns:
        (N,), > 0.
    """
    power = 1 << (num_heads.bit_length() - 1)  # P
    whole = torch.arange(1, power + 1, device=device, dtype=dtype)
    between = torch.arange(num_heads - power, device=device, dtype=dtype) + 0.5
    return torch.exp2(torch.cat([whole, between]) * (-8 / power))
