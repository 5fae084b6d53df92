"""The Context-Aware Gate: how fast each token's attention fades with distance (SDT Eq. 4-5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.layers.initial import Initialised
from spatial_decay.precision import autocast_disabled

__all__ = ["ContextAwareGate"]


class ContextAwareGate(Initialised):
    """G = log sigmoid(X W_g) <= 0, one value a token and head.

    Computed in float32 at least, under autocast too: decays are multiplied by distances and summed along paths.

    Args:
        dim: D, width of the tokens.
        num_heads: N.
        bias: Add a trained bias to X W_g. The paper has none.
        bias_init: Its first value. The gate starts near log sigmoid(bias_init): 0 gives -0.69, 6 gives -0.0025,
            which is nearly no decay.

    Raises:
        ValueError: bias_init without bias; num_heads < 1.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = False, bias_init: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be >= 1: got {num_heads}.")
        if bias_init and not bias:
            raise ValueError(f"bias_init needs a bias: got bias_init={bias_init} with bias=False. Pass bias=True.")
        self.dim, self.num_heads, self.bias_init = dim, num_heads, bias_init
        self.weight = nn.Parameter(torch.empty(num_heads, dim))
        self.bias = nn.Parameter(torch.empty(num_heads)) if bias else None
        self.reset_parameters()

    def fill(self) -> None:
        """Small weights: at first the gate is nearly the same everywhere."""
        self.weight.normal_(std=0.02)
        if self.bias is not None:
            self.bias.fill_(self.bias_init)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., D) -> G (..., N), nats per grid step, <= 0, float32 or float64.

        Raises:
            TypeError: x is not floating point.
            ValueError: the last dimension of x is not D.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point: got {x.dtype}. Convert it first, for instance x.float().")
        if x.shape[-1] != self.dim:
            raise ValueError(f"the last dimension of x must be dim = {self.dim}: got shape {tuple(x.shape)}.")
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with autocast_disabled(x.device):
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.logsigmoid(F.linear(x.to(dtype), self.weight.to(dtype), bias))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, bias={self.bias is not None}"
