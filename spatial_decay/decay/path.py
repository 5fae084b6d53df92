"""Decay that adds up along the raster sequence: SDT Eq. 6 (`1d`), Table 4's `bidirectional`, each axis of Eq. 11."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from spatial_decay.decay.base import STRONGEST, FactoredDecay, check_range, register_factor
from spatial_decay.layout import Layout
from spatial_decay.precision import at_least_float32

__all__ = ["PathDecay", "order"]


@register_factor
def order(*steps: Tensor) -> Tensor:
    """1 where the key comes after the query in raster order, -1 where before, 0 where both lie at one place."""
    first, *others = (step.sign() for step in steps)
    for sign in others:  # an axis outweighs those behind it
        first = torch.add(sign, first, alpha=2)
    return first.sign_()  # in place: to fill fresh memory takes as long as the rest


@dataclass(frozen=True)
class PathDecay(FactoredDecay):
    """M[i, j] = -|c_i - c_j|: what the path along the raster sequence from one token to the other costs.

    Written (c_i - c_j) * order(steps), because c grows: so the gradient is right also where c_i = c_j. Tokens at one
    place, which only Positions can have, add nothing to each other.

    Args:
        cumulative: c, (B, N, L), nats, growing along the raster sequence; B may be 1. Its values at prefix tokens are
            not used.
        layout: Where the L tokens lie.
        causal: A query attends to itself and to earlier tokens only: -inf above the diagonal.
    """

    cumulative: Tensor
    layout: Layout
    causal: bool = False

    sign: ClassVar[int] = -1
    factor: ClassVar[str] = "order"

    @property
    def hides_later(self) -> bool:
        return self.causal

    @classmethod
    def from_gate(cls, gate: Tensor, layout: Layout, *, causal: bool = False) -> Self:
        """SDT Eq. 6 from a gate g (B, N, L) <= 0: minus the sum of |g_k| for k = min(i, j) .. max(i, j) - 1.

        Differs from Eq. 6, which is written for i > j only: vision is not causal, so this is its symmetric
        extension. causal=True gives Eq. 6 itself, with -inf above the diagonal. A gate below -256 counts as -256.

        Args:
            gate: g, (B, N, L), <= 0, nats per token of the path.
            layout: Where the L tokens lie.
            causal: Eq. 6 itself: -inf above the diagonal.

        Returns:
            The decay, whose c is float32 at least.

        Raises:
            ValueError: gate > 0. Looked at where that does not wait for a GPU: on the CPU, uncompiled.
        """
        return cls(layout.running_sum(_cost("gate", gate, layout), inclusive=False), layout, causal)

    @classmethod
    def bidirectional(cls, forward_gate: Tensor, backward_gate: Tensor, layout: Layout) -> Self:
        """The mean of two `1d` masks with a gate each (SDT Table 4), gates (B, N, L).

        The forward scan sums k = min .. max - 1, the backward scan k = min + 1 .. max. Both sums grow along the raster
        sequence, so their mean is again one c.

        Args:
            forward_gate: (B, N, L), <= 0, nats per token of the path.
            backward_gate: The same, of the backward scan.
            layout: Where the L tokens lie.

        Returns:
            One decay, whose c is the mean of both sums.

        Raises:
            ValueError: a gate > 0, as in from_gate.
        """
        forward = layout.running_sum(_cost("forward_gate", forward_gate, layout), inclusive=False)
        backward = layout.running_sum(_cost("backward_gate", backward_gate, layout), inclusive=True)
        return cls((forward + backward) / 2, layout)


def _cost(name: str, gate: Tensor, layout: Layout) -> Tensor:
    """|g| as -g, which has a gradient where g is 0, as a gate near "no decay" rounds to."""
    check_range(name, gate, layout, -math.inf, 0.0)
    return (-at_least_float32(gate)).clamp(max=STRONGEST)
