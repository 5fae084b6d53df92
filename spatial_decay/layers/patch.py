"""From pixels to tokens and from one stage to the next, by overlapping convolutions as RMT has them.

What they give is contiguous, so that the norms and projections of all blocks behind them need no copies.
"""

from torch import Tensor, nn

__all__ = ["STEM_STRIDES", "ConvStem", "Downsample"]

STEM_STRIDES = {1: (1, 1, 1, 1), 2: (2, 1, 1, 1), 4: (2, 1, 2, 1)}
"""Stride of the stem -> strides of its four convolutions."""


class ConvStem(nn.Module):
    """Four 3x3 convolutions with batch norm, GELU between them.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the tokens.
        stride: 4 (ImageNet), 2 or 1 (small images).

    Raises:
        ValueError: unknown stride, or odd dim.
    """

    def __init__(self, in_chans: int, dim: int, *, stride: int = 4) -> None:
        super().__init__()
        if stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride must be one of {', '.join(map(str, STEM_STRIDES))}: got {stride}.")
        if dim % 2:
            raise ValueError(f"the first of embed_dims must be even, the stem halves it: got {dim}.")
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        layers: list[nn.Module] = []
        for i, step in enumerate(STEM_STRIDES[stride]):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, step, 1), nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])  # no GELU after the last

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> a map (B, ceil(H / stride), ceil(W / stride), dim), contiguous."""
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 with batch norm: half the size, another width.

    Args:
        dim: Channels in.
        out_dim: Channels out.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim), contiguous."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).contiguous()
