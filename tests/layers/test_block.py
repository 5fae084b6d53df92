"""SDTBlock and its parts."""

import pytest
import torch

from spatial_decay import SDTBlock, kinds
from spatial_decay.layers import ConvMlp, DepthwiseConv, DropPath, LayerScale
from spatial_decay.layout import Grid
from tests import references


@pytest.mark.parametrize("kind", list(kinds.KINDS))
def test_is_the_sum_of_its_branches(kind):
    block = SDTBlock(16, 2, decay=kind, init_values=0.5, drop_path=0.3, mlp_ratio=2.5).double().eval()
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    flat, grid = x.flatten(1, 2), Grid(3, 4)
    y = flat + block.pos(flat, grid)
    y = y + 0.5 * block.attn(block.norm1(y), (3, 4))
    y = y + 0.5 * block.mlp(block.norm2(y), grid)
    torch.testing.assert_close(block(x), y.reshape(x.shape))
    assert block.mlp.fc1.out_features == 40


def test_tokens_with_prefix():
    block = SDTBlock(16, 2, num_prefix_tokens=3)
    x = torch.randn(2, 3 + 6, 16)
    assert block(x, (2, 3)).shape == x.shape


def test_options_reach_the_attention():
    block = SDTBlock(16, 2, decay=kinds.Full(alpha=0.3), rope="none", gate_rank=0, backend="math")
    assert (block.attn.decay.kind.alpha, block.attn.rope.mode, block.attn.output_gate) == (0.3, "none", None)
    with pytest.raises(TypeError, match="gate_ranks"):
        SDTBlock(16, 2, gate_ranks=3)


def test_attn_mask_reaches_the_attention():
    block = SDTBlock(16, 2)
    x = torch.randn(1, 2, 2, 16)
    mask = torch.eye(4, dtype=torch.bool)
    assert not torch.allclose(block(x), block(x, attn_mask=mask))


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_depthwise_is_a_convolution_over_the_grid(kernel_size, num_prefix):
    conv = DepthwiseConv(3, kernel_size).double()
    x = torch.randn(1, num_prefix + 20, 3, dtype=torch.float64)
    out = conv(x, Grid(4, 5, num_prefix))
    assert (out[:, :num_prefix] == 0).all()
    for channel in range(3):
        expected = references.depthwise(
            x[0, num_prefix:, channel].tolist(),
            conv.conv.weight[channel, 0].tolist(),
            conv.conv.bias[channel].item(),
            4,
            5,
        )
        torch.testing.assert_close(out[0, num_prefix:, channel], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kernel_size", [2, -1])
def test_even_kernels_are_refused(kernel_size):
    with pytest.raises(ValueError, match=f"must be odd and >= 1: got {kernel_size}"):
        DepthwiseConv(3, kernel_size)


def test_mlp_without_convolution_is_plain():
    mlp = ConvMlp(4, 8, kernel_size=0)
    x = torch.randn(1, 6, 4)
    torch.testing.assert_close(mlp(x, Grid(2, 3)), mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x))))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = torch.ones(4000, 3, 2)
    out = DropPath(0.25).train()(x)
    per_image = out.flatten(1)
    assert (per_image == per_image[:, :1]).all()
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(out.mean().item() - 1) < 0.05  # 6 standard deviations
    assert torch.equal(DropPath(0.25).eval()(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_path_is_refused(rate):
    with pytest.raises(ValueError, match="0 <= drop_path < 1"):
        DropPath(rate)


def test_layer_scale():
    assert torch.equal(LayerScale(3, 0.5)(torch.ones(2, 3)), torch.full((2, 3), 0.5))
