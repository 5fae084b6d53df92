"""Decay with the squared distance (`squared`): as content-aware as SDT Eq. 8-9, and a product of a few channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import FactoredDecay, check_range, register_factor, strength_of_gate
from spatial_decay.layout import Layout
from spatial_decay.precision import at_least_float32

__all__ = ["SquaredDecay", "squared_distance"]

_LOWEST = -(2.0**64)  # two of them, times the square of a distance below 2 ** 31, are a number still in float32


@register_factor
def squared_distance(*steps: Tensor) -> Tensor:
    """dh^2 + dw^2, the Euclidean distance squared; on a grid one sum a pair."""
    first, *others = (step.square() for step in steps)
    for other in others:
        first = first + other
    return first


@dataclass(frozen=True)
class SquaredDecay(FactoredDecay):
    """M[i, j] = (a_i + a_j) * (dh^2 + dw^2).

    With a = alpha * G / 2 it is SDT Eq. 8-9 with another distance. Unlike Manhattan's, its mask is a product of 8
    channels of queries and of keys, whatever L is (`channels`). So attention without a mask computes it: backend
    `lowrank`. As a mask, and in all other kernels, it costs what a ManhattanDecay costs.

    Args:
        strength: a, (B, N, L), <= 0, nats per square grid step; B may be 1. Its values at prefix tokens are not used.
        layout: Where the L tokens lie.

    Raises:
        ValueError: strength > 0 or below -2 ** 64, see ManhattanDecay.
    """

    strength: Tensor
    layout: Layout

    sign: ClassVar[int] = 1
    factor: ClassVar[str] = "squared_distance"

    def __post_init__(self) -> None:
        check_range("strength", self.strength, self.layout, _LOWEST, 0.0)

    @classmethod
    def from_gate(cls, gate: Tensor, layout: Layout, *, alpha: float = 0.01) -> Self:
        """From a gate G (B, N, L) <= 0 and the scale alpha > 0; alpha * G / 2 counts as -2 ** 64 at least.

        Args:
            gate: G, (B, N, L), <= 0, nats per square grid step.
            layout: Where the L tokens lie.
            alpha: A tenth of the paper's: along an axis this is as much as Eq. 8 at 10 grid steps.

        Returns:
            The decay, whose strength is float32 at least.

        Raises:
            ValueError: alpha <= 0 or not finite; gate > 0, looked at as in the class.
        """
        return cls(strength_of_gate(gate, layout, alpha=alpha, lowest=_LOWEST), layout)

    def channels(self) -> tuple[Tensor, Tensor]:
        """8 channels a side: with r = |p|^2, (a_i + a_j) * |p_i - p_j|^2 is

        a_i r_j + r_i a_j + a_j r_j + a_i r_i - 2 (a_i p_i) . p_j - 2 p_i . (a_j p_j)

        All of them are 0 where a token lies nowhere. The terms cancel where tokens are close to each other. Positions p
        count from the middle of the tokens, which keeps the terms small.

        Returns:
            Of queries and of keys, (B, N, L, 8) each, float32 at least.
        """
        num_prefix, (a, one, axes) = self.layout.num_prefix_tokens, self._placed()
        a = F.pad(a, (num_prefix, 0)) if num_prefix else a
        r, zero = squared_distance(*axes), torch.zeros_like(one)
        none, minus_twice = [zero] * len(axes), [-2 * p for p in axes]
        queries = [one, zero, zero, r, *axes, *none], [zero, r, one, zero, *none, *axes]
        keys = [zero, one, r, zero, *none, *minus_twice], [r, zero, zero, one, *minus_twice, *none]
        return _channels(a, *queries, num_prefix), _channels(a, *keys, num_prefix)

    def largest_term(self) -> Tensor:
        """The largest a_i times the largest r_j or 2 p_i p_j, of shape (): in a third of the time of `channels`."""
        a, _, axes = self._placed()
        return a.abs().amax() * torch.stack([squared_distance(*axes), *(2 * p.square() for p in axes)]).amax()

    def _placed(self) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """a, ones, and positions from the middle, of the tokens behind prefix tokens; all 0 where one lies nowhere."""
        layout = self.layout
        a = at_least_float32(self.strength)[..., layout.num_prefix_tokens :]
        axes = layout.positions(device=a.device, dtype=a.dtype)
        one = torch.ones_like(axes[0])
        if layout.known is not None:
            a, one = a.masked_fill(~layout.known[:, None], 0.0), layout.known[:, None].to(a)
        # Whole numbers as middle: so whole positions stay so, and half precision holds them.
        count = one.sum(-1, keepdim=True).clamp(min=1)
        axes = tuple((p - ((p * one).sum(-1, keepdim=True) / count).round()) * one for p in axes)
        return a, one, axes


def _channels(a: Tensor, slope: Sequence[Tensor], constant: Sequence[Tensor], num_prefix: int) -> Tensor:
    """constant + a * slope, (B, N, L, channels), with zeros for prefix tokens."""
    slopes, constants = (F.pad(torch.stack(list(x), -1), (0, 0, num_prefix, 0)) for x in (slope, constant))
    return torch.addcmul(constants, a[..., None], slopes)
