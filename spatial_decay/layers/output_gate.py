"""The low-rank output gate, U = sigmoid(X W_u1) W_u2 of SDT Eq. 13."""

import torch
from torch import Tensor, nn

__all__ = ["OutputGate"]


class OutputGate(nn.Module):
    """U = sigmoid(X W_u1) W_u2: how much of each channel of the attention's output passes.

    The paper does not say how it starts. With small random W_u2 the gate would be near zero and shut the layer;
    here W_u2 starts around 2 / r, so that U starts around 1 and the layer as attention without a gate.

    Args:
        dim: D.
        rank: r, width between W_u1 and W_u2.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U around 1: sigmoid(0) * (2 / r) summed over r, and a little noise."""
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.normal_(self.up.weight, mean=2 / self.down.out_features, std=0.02 / self.down.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., D) -> U (..., D)."""
        return self.up(torch.sigmoid(self.down(x)))
