"""From pixels to tokens and from one stage to the next: ViT's patches, and overlapping convolutions as RMT has them."""

import torch
from torch import Tensor, nn

from spatial_decay.layers.initial import fill_skipped
from spatial_decay.layout import GridSize
from spatial_decay.precision import check_like_weights
from spatial_decay.values import are_readable

__all__ = ["STEM_STRIDES", "ConvStem", "Downsample", "PatchEmbed", "check_images", "size_in_patches"]

STEM_STRIDES = {1: (1, 1, 1, 1), 2: (2, 1, 1, 1), 4: (2, 1, 2, 1)}
"""Stride of the stem -> strides of its four convolutions."""


class PatchEmbed(nn.Module):
    """Patches beside each other, by one convolution whose stride is its kernel (ViT, DiT).

    Args:
        in_chans: Channels of the image.
        dim: D.
        patch_size: Side of a patch.
        images: What its images are called in errors.

    Raises:
        ValueError: patch_size < 1.
    """

    def __init__(self, in_chans: int, dim: int, *, patch_size: int, images: str = "images") -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be >= 1: got {patch_size}.")
        self.in_chans, self.patch_size, self.images = in_chans, patch_size, images
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        fill_skipped(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> a map (B, H / patch_size, W / patch_size, D).

        Raises:
            TypeError: x is not floating point, or has another dtype than the weights.
            ValueError: wrong rank or channels; H or W no multiple of the patch size.
        """
        check_images(x, self.in_chans, self.proj.weight, self.images)
        if any(size < self.patch_size or size % self.patch_size for size in x.shape[2:]):
            raise ValueError(
                f"height and width of {self.images} must be multiples of patch_size = {self.patch_size}: got "
                f"{x.shape[2]} x {x.shape[3]}. Resize or pad them."
            )
        return self.proj(x).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Four 3x3 convolutions with batch norm, GELU between them.

    What it gives is contiguous, so that the norms and projections of all blocks behind it need no copies.

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
        fill_skipped(*self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> a map (B, ceil(H / stride), ceil(W / stride), dim), contiguous."""
        # 0.5 to 0.9 of the time of the whole stem on CPUs; on GPUs it has not been measured. vmap knows no such format.
        if x.is_cpu and (torch.compiler.is_compiling() or are_readable(x)):
            x = x.contiguous(memory_format=torch.channels_last)
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class Downsample(nn.Module):
    """A 3x3 convolution with batch norm: half the size, another width.

    What it gives is contiguous, as what ConvStem gives.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        stride: 2, or 1 to keep the size.
    """

    def __init__(self, dim: int, out_dim: int, *, stride: int = 2) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride, 1)
        self.norm = nn.BatchNorm2d(out_dim)
        fill_skipped(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), contiguous."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).contiguous()


def size_in_patches(name: str, size: int | GridSize, patch_size: int) -> tuple[int, int]:
    """(H, W) in patches of images whose size is one number, their side, or (H, W).

    Raises:
        ValueError: neither, or no multiple of patch_size; name is what the size is called.
    """
    sides = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(sides, (tuple, list)) and len(sides) == 2 and all(isinstance(side, int) for side in sides)
    if not is_pair:
        raise ValueError(f"{name} must be one whole number or (H, W): got {size!r}.")
    if patch_size < 1 or any(side < patch_size or side % patch_size for side in sides):
        raise ValueError(f"{name} must be a multiple of patch_size: got {name}={size}, patch_size={patch_size}.")
    return sides[0] // patch_size, sides[1] // patch_size


def check_images(x: Tensor, in_chans: int, weight: object, images: str = "images") -> None:
    """Raise TypeError or ValueError where images are not (B, in_chans, H, W), like the weight in dtype and device."""
    if not x.is_floating_point():
        raise TypeError(f"{images} must be floating point: got {x.dtype}. Convert them first, for instance x / 255.")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{images} must be (B, {in_chans}, H, W): got shape {tuple(x.shape)}.")
    check_like_weights(images, x, weight)
