"""A trained rate a head: the decay that all images share, of kind `learned`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.layers.initial import Initialised
from spatial_decay.precision import at_least_float32

__all__ = ["TrainedRates"]


class TrainedRates(Initialised):
    """softplus(lambda_n) > 0, one trained value a head, nats per grid step.

    It begins as RMT's rates. These are -log(1 - u_n) with u_n = 2 ** (-initial_value - heads_range * n / N), so that
    lambda_n begins as log(u_n / (1 - u_n)), a number wherever that exponent is below 0.

    Args:
        num_heads: N.
        initial_value: Of head 0.
        heads_range: How much more the last head sees at first.
    """

    def __init__(self, num_heads: int, *, initial_value: float = 2.0, heads_range: float = 4.0) -> None:
        super().__init__()
        self.num_heads, self.initial_value, self.heads_range = num_heads, initial_value, heads_range
        self.weight = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def fill(self) -> None:
        """RMT's rates."""
        ones = torch.ones_like(at_least_float32(self.weight))  # of a sharded weight too, which takes no plain tensor
        exponents = self.initial_value + self.heads_range * (ones.cumsum(0) - 1) / self.num_heads
        log_u = -math.log(2) * exponents
        self.weight.copy_(log_u - torch.log(-torch.expm1(log_u)))

    def forward(self) -> Tensor:
        """The rates as they are now.

        Returns:
            (N,), > 0, nats per grid step, float32 or float64.
        """
        return F.softplus(at_least_float32(self.weight))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, initial_value={self.initial_value}, heads_range={self.heads_range}"
