"""What stands on a residual branch: stochastic depth and LayerScale."""

import torch
from torch import Tensor, nn

from spatial_decay.layers.initial import Initialised

__all__ = ["DropPath", "LayerScale"]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the branch for whole images and scales up the others.

    Args:
        drop_prob: Share of images that lose the branch, 0 <= drop_prob < 1.

    Raises:
        ValueError: drop_prob is out of range.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_path must satisfy 0 <= drop_path < 1: got {drop_prob}.")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not (self.training and self.drop_prob):
            return x
        keep_prob = 1.0 - self.drop_prob
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) < keep_prob
        return x * (kept / keep_prob).to(x.dtype)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class LayerScale(Initialised):
    """Multiplies each channel by a trained factor.

    Args:
        dim: D.
        init_values: First value of the factors.
    """

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def fill(self) -> None:
        self.gamma.fill_(self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x * self.gamma
