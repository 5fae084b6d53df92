"""A depthwise convolution over the grid: LPE(.) of SDT Eq. 13, positions at a block's start, and inside its MLP."""

import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.features import map_to_tokens, tokens_to_map
from spatial_decay.layers.initial import Conv2d
from spatial_decay.layout import Layout

__all__ = ["DepthwiseConv"]


class DepthwiseConv(nn.Module):
    """One k x k filter a channel, stride 1, same size out. Prefix tokens have no neighbours and give zero.

    It serves as the LPE of the values, as the position encoding of a block and inside the FFN.

    Args:
        dim: Channels.
        kernel_size: k, odd.

    Raises:
        ValueError: k is even or < 1.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel sizes of depthwise convolutions must be odd and >= 1: got {kernel_size}. 0 turns the part off."
            )
        self.conv = Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Tokens (B, L, D) of a grid -> (B, L, D).

        Args:
            x: Tokens (B, L, D).
            layout: A Grid; prefix tokens get zero.

        Returns:
            (B, L, D).

        Raises:
            ValueError: Positions, which may leave gaps.
        """
        grid = layout.as_grid(
            "a convolution",
            "Build the layer with lpe_kernel_size=0, and a block also with pos_kernel_size=0 and mlp_kernel_size=0.",
        )
        out = map_to_tokens(self.conv(tokens_to_map(x, grid)))  # (B, H*W, D)
        return F.pad(out, (0, 0, grid.num_prefix_tokens, 0)) if grid.num_prefix_tokens else out
