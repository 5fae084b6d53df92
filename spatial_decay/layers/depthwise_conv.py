"""A depthwise convolution over the grid: LPE(.) of SDT Eq. 13, positions at a block's start, and inside its MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

from spatial_decay.features import map_to_tokens, tokens_to_map
from spatial_decay.layers.initial import Conv2d
from spatial_decay.layout import Layout
from spatial_decay.precision import autocast_dtype
from spatial_decay.values import are_readable

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
        self.conv = _Filters(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

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


class _Filters(Conv2d):
    """A depthwise convolution whose wide filters get their gradient in parts, where that is faster."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = [x, weight] if bias is None else [x, weight, bias]
        lowered = autocast_dtype(x.device)
        dtype = lowered or x.dtype
        dtypes = {dtype, *(t.dtype for t in given)}  # of several, PyTorch says what it does
        if not dtypes <= _FAST or (len(dtypes) > 1 and lowered is None) or not _pays(*given):
            return super()._conv_forward(x, weight, bias)
        return _InParts.apply(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


_FAST = {torch.float32, torch.bfloat16}


def _pays(x: Tensor, weight: Tensor, *bias: Tensor) -> bool:
    """Whether oneDNN has no fast gradient of the filters: on the CPU, for those wider than 3, on maps of some rows.

    At 200 x 336 tokens of 64 channels, float32, one thread, that of 5 x 5 takes 190 ms and that of 5 x 3 takes 6.
    """
    return (
        torch.is_grad_enabled()
        and weight.requires_grad
        and are_readable(x, weight, *bias)  # before what is asked of sizes
        and 3 < weight.shape[-1] <= 13
        and x.shape[-2] > 1
        and forward_ad._current_level < 0
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


class _InParts(torch.autograd.Function):
    """Convolution of x (B, D, H, W) by weight (D, 1, k, k) and bias; the gradient of weight by groups of columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        # What is differentiated again, or comes in batches, is left to PyTorch.
        in_parts = of_weight and not torch.is_grad_enabled() and are_readable(grad)
        wanted = [of_x, of_weight and not in_parts, of_bias and not in_parts]
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            bias_sizes=[len(weight)],
            stride=[1, 1],
            padding=[weight.shape[-1] // 2] * 2,
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=len(weight),
            output_mask=wanted,
        )
        if in_parts:
            dweight, dbias = _gradient_of_filters(x, grad, weight), grad.sum((0, 2, 3)) if of_bias else None
        return dx, dweight, dbias


def _gradient_of_filters(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The three columns in the middle as of filters (k, 3); each other one as of filters (k, 1) of an x moved by it."""
    dim, half = len(weight), weight.shape[-1] // 2
    size, out = weight.shape[2], torch.zeros_like(weight)
    out[..., half - 1 : half + 2] = conv2d_weight(x, (dim, 1, size, 3), grad, padding=(half, 1), groups=dim)
    for i in range(2, min(half, x.shape[-1] - 1) + 1):
        for column, moved, seen in ((half + i, x[..., i:], grad[..., :-i]), (half - i, x[..., :-i], grad[..., i:])):
            one = conv2d_weight(moved, (dim, 1, size, 1), seen, padding=(half, 0), groups=dim)
            out[..., column] = one.squeeze(-1)
    return out
