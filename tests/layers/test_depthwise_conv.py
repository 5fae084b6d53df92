"""The gradient of wide depthwise filters, which the CPU gets in parts: that of F.conv2d, by another way."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from spatial_decay.layers import DepthwiseConv
from spatial_decay.layout import Grid

IN_PARTS = torch.backends.cpu.get_cpu_capability().startswith("AVX")


def gradients(conv, x, height, width):
    parameters = (x, conv.conv.weight, conv.conv.bias)
    out = conv(x, Grid(height, width))
    wanted = F.conv2d(
        x.unflatten(1, (height, width)).movedim(-1, 1), *parameters[1:], padding=conv.conv.padding, groups=x.shape[-1]
    )
    torch.testing.assert_close(out, wanted.flatten(2).mT)
    found, expected = (torch.autograd.grad(y.sin().sum(), parameters) for y in (out, wanted))
    return found, expected


@pytest.mark.parametrize(("height", "width"), [(6, 9), (3, 2), (1, 1), (2, 3)])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_gradients_are_those_of_pytorch(kernel_size, height, width):
    x = torch.randn(2, height * width, 4, requires_grad=True)
    for found, expected in zip(*gradients(DepthwiseConv(4, kernel_size), x, height, width), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not IN_PARTS, reason="needs oneDNN for AVX2 or AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_wide_filters_is_computed_in_parts(dtype):
    conv, x = DepthwiseConv(4, 5), torch.randn(2, 54, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = conv(x, Grid(6, 9))
    assert out.dtype == dtype
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as of:
        out.float().sum().backward()
    asked = [event.input_shapes[2] for event in of.events() if event.name == "aten::convolution_backward"]
    assert [shape[-1] for shape in asked] == [5, 3, 1, 1]  # the first is that of x
    assert conv.conv.weight.grad.dtype == torch.float32


def test_second_derivatives_are_those_of_pytorch():
    conv, x = DepthwiseConv(4, 5), torch.randn(1, 12, 4, requires_grad=True)
    weight = conv.conv.weight

    def second(out):
        (first,) = torch.autograd.grad(out.sin().sum(), weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    wanted = F.conv2d(x.unflatten(1, (3, 4)).movedim(-1, 1), weight, conv.conv.bias, padding=2, groups=4)
    for found, expected in zip(second(conv(x, Grid(3, 4))), second(wanted), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_needs_no_gradient_gets_none():
    conv, x = DepthwiseConv(4, 5), torch.randn(1, 12, 4, requires_grad=True)
    conv.conv.bias.requires_grad_(False)
    conv(x, Grid(3, 4)).sum().backward()
    assert conv.conv.bias.grad is None
    assert x.grad is not None
    conv.conv.weight.requires_grad_(False)
    assert torch.func.jvp(lambda x: conv(x, Grid(3, 4)), (x,), (x,))[1].shape == x.shape


def test_transforms_see_pytorchs_own():
    conv, x = DepthwiseConv(4, 5), torch.randn(2, 12, 4)
    scales = torch.tensor([1.0, 2.0])
    found = torch.func.vmap(lambda scale: conv(x, Grid(3, 4)) * scale)(scales)  # neither x nor weights are batched
    torch.testing.assert_close(found, torch.stack([conv(x, Grid(3, 4)) * scale for scale in scales]))

    def loss(weights, x):
        return torch.func.functional_call(conv, weights, (x[None], Grid(3, 4))).square().sum()

    weights = dict(conv.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, tokens in enumerate(x):
        one = torch.autograd.grad(loss(weights, tokens), [*weights.values()])
        for name, grad in zip(weights, one, strict=True):
            torch.testing.assert_close(each[name][i], grad)


def test_dtypes_that_differ_are_left_to_pytorch():
    conv, x = DepthwiseConv(4, 5), torch.randn(1, 12, 4)
    for other in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError):
            conv(x.to(other), Grid(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv.double()(x.double(), Grid(3, 4)).dtype == torch.float64
