"""The feed-forward network of a block, with a depthwise convolution inside as RMT has it."""

import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.layers.depthwise_conv import DepthwiseConv
from spatial_decay.layers.initial import fill_skipped
from spatial_decay.layout import Layout

__all__ = ["ConvMlp"]


class ConvMlp(nn.Module):
    """z = gelu(X W_1 + b_1), out = (z + conv(z)) W_2 + b_2.

    Args:
        dim: D.
        hidden_dim: Width in between.
        kernel_size: Of the depthwise convolution; 0 leaves a plain MLP.
        approximate: Of gelu, "none" or "tanh".
    """

    def __init__(self, dim: int, hidden_dim: int, *, kernel_size: int = 3, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = DepthwiseConv(hidden_dim, kernel_size) if kernel_size else None
        self.fc2 = nn.Linear(hidden_dim, dim)
        fill_skipped(self.fc1, self.fc2)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D).

        Args:
            x: Tokens (B, L, D).
            layout: Where the L tokens lie.

        Returns:
            (B, L, D).

        Raises:
            ValueError: Positions with a convolution, which needs a whole grid.
        """
        z = F.gelu(self.fc1(x), approximate=self.approximate)  # (B, L, hidden_dim)
        if self.conv is not None:
            z = z + self.conv(z, layout)
        return self.fc2(z)
