"""The low-rank output gate, U = sigmoid(X W_u1) W_u2 of SDT Eq. 13."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.layers.initial import Initialised

__all__ = ["OutputGate"]


class OutputGate(Initialised):
    """U = sigmoid(X W_u1) W_u2: how much of each channel of the attention's output passes.

    The paper does not say how it starts. With small random W_u2 the gate would be near zero and shut the layer;
    here W_u2 starts around 2 / r, so that U starts around 1 and the layer as attention without a gate. The two
    matrices are parameters and no nn.Linear, so that a model's own initialisation of its linear layers leaves them.

    Args:
        dim: D.
        rank: r, width between W_u1 and W_u2, >= 1.

    Raises:
        ValueError: rank < 1.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"gate_rank must be >= 0 (0 turns the output gate off): got {rank}.")
        self.down = nn.Parameter(torch.empty(rank, dim))
        self.up = nn.Parameter(torch.empty(dim, rank))
        self.reset_parameters()

    def fill(self) -> None:
        """U around 1: sigmoid(0) * (2 / r) summed over r, and a little noise."""
        rank = len(self.down)
        self.down.normal_(std=0.02)
        self.up.normal_(mean=2 / rank, std=0.02 / rank)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., D) -> U (..., D)."""
        return F.linear(torch.sigmoid(F.linear(x, self.down)), self.up)

    def extra_repr(self) -> str:
        return f"dim={len(self.up)}, rank={len(self.down)}"
