"""Decay with the Manhattan distance: SDT Eq. 7-9 (`full`, content-aware), constant rates (`fixed`) or trained ones."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import FactoredDecay, check_range, register_factor, strength_of_gate
from spatial_decay.layout import Layout
from spatial_decay.precision import at_least_float32

__all__ = ["LOWEST", "ManhattanDecay", "fixed_rates", "manhattan_distance", "shared_strength"]

LOWEST = -(2.0**100)
"""Of a strength: two of them, times a distance below 1e8, are a number still in float32."""


@register_factor
def manhattan_distance(*steps: Tensor) -> Tensor:
    """d_M = |dh| + |dw| in grid steps (SDT Eq. 7); on a grid one sum a pair."""
    first, *others = (step.abs() for step in steps)
    for other in others:
        first = first + other
    return first


@dataclass(frozen=True)
class ManhattanDecay(FactoredDecay):
    """M[i, j] = (a_i + a_j) * d_M(i, j).

    With a = alpha * G / 2 this is SDT Eq. 8-9, -|(G_i + G_j) / 2 * d_M * alpha|, because G <= 0 and alpha > 0.
    With a = -|lambda_n| / 2 for all tokens of a head it is RMT's fixed decay.

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
    factor: ClassVar[str] = "manhattan_distance"

    def __post_init__(self) -> None:
        check_range("strength", self.strength, self.layout, LOWEST, 0.0)

    @classmethod
    def from_gate(cls, gate: Tensor, layout: Layout, *, alpha: float = 0.1) -> Self:
        """SDT Eq. 8-9 from a gate G (B, N, L) <= 0 and the scale alpha > 0; alpha * G / 2 counts as -2 ** 100 at least.

        Args:
            gate: G, (B, N, L), <= 0, nats per grid step.
            layout: Where the L tokens lie.
            alpha: The paper's scale.

        Returns:
            The decay, whose strength is float32 at least.

        Raises:
            ValueError: alpha <= 0 or not finite; gate > 0, looked at as in the class.
        """
        return cls(strength_of_gate(gate, layout, alpha=alpha, lowest=LOWEST), layout)

    @classmethod
    def constant(cls, rates: Tensor, layout: Layout) -> Self:
        """-|lambda_n| * d_M from one rate a head, (N,), nats per grid step.

        Args:
            rates: lambda_n, (N,), nats per grid step; their sign does not count.
            layout: Where the L tokens lie.

        Returns:
            A decay that all images share.
        """
        return cls(shared_strength(rates, layout), layout)


def shared_strength(rates: Tensor, layout: Layout) -> Tensor:
    """-|rate| / 2 of each head, (N,), for all tokens: a strength (1, N, L) whose pairs add up to -|rate|.

    Args:
        rates: (N,), nats per grid step; their sign does not count.
        layout: Where the L tokens lie.

    Returns:
        (1, N, L), float32 at least, in the memory of N numbers.
    """
    strength = at_least_float32(rates).abs() / -2
    return strength[None, :, None].expand(1, -1, layout.num_tokens)


def fixed_rates(
    num_heads: int, *, initial_value: float, heads_range: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """RMT's rates lambda_n = log(1 - 2 ** (-initial_value - heads_range * n / N)) < 0, (N,), nats per grid step.

    Head 0 looks at the nearest tokens only; the last head sees nearly everything.

    Args:
        num_heads: N.
        initial_value: Of head 0.
        heads_range: How much more the last head sees.
        device: Of the rates.
        dtype: Of the rates.

    Returns:
        (N,), < 0.
    """
    exponents = initial_value + heads_range * torch.arange(num_heads, device=device, dtype=dtype) / num_heads
    # Of these two ways to say log(1 - u) each is exact on its own side of u = 1/2.
    log_u = -math.log(2) * exponents
    return torch.where(exponents < 1, torch.log(-torch.expm1(log_u)), torch.log1p(-torch.exp2(-exponents)))
