"""GaussianGate against loops written from the authors' definitions, and attention with kind `gaussian`."""

import math

import pytest
import torch

from spatial_decay import SpatialDecayAttention, kinds
from spatial_decay.decay import dense
from spatial_decay.layers import GaussianGate
from spatial_decay.layers.core import merge_heads
from spatial_decay.layout import Grid
from tests import references


def by_hand(gate, q, size, initial, limit):
    """LocAtViT's addition for one head, L x L, from queries (L, d): its formula in loops."""
    longest = max(initial)
    shift = math.log(longest**2 - 1) if longest**2 > 2 else 0.0
    ratio = min(size) / min(initial) if tuple(size) != tuple(initial) else 1.0
    eps = 0.1
    while 0.5 * (longest - 1) ** 2 / eps**2 > 65000 / 2:
        eps *= 2
    numbers = []
    for token in q.tolist():

        def linear(layer, k, token=token):
            return sum(a * b for a, b in zip(token, layer.weight[k].tolist(), strict=True)) + layer.bias[k].item()

        amplitude = math.log1p(math.exp(linear(gate.log_alpha, 0)))
        variances = (longest**2 * ratio * references.sigmoid(linear(gate.log_var, k) - shift) + eps for k in (0, 1))
        numbers.append((amplitude, *variances))
    length, width = size[0] * size[1], size[1]
    return [
        [
            numbers[i][0]
            * math.exp(
                -min(0.5 * (i // width - j // width) ** 2, limit) / numbers[i][1]
                - min(0.5 * (i % width - j % width) ** 2, limit) / numbers[i][2]
            )
            for j in range(length)
        ]
        for i in range(length)
    ]


@pytest.mark.parametrize(
    ("size", "initial"), [((3, 4), (3, 4)), ((4, 5), (3, 3)), ((2, 2), (4, 6)), ((1, 3), (1, 1)), ((3, 3), (200, 200))]
)
def test_equals_the_authors_formula(size, initial):
    gate = GaussianGate(8, initial).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    grid = Grid(*size)
    q = torch.randn(1, 1, grid.num_tokens, 8, dtype=torch.float64)
    limit = min(0.5 * (max(initial) - 1) ** 2, 6550.0)
    expected = torch.tensor(by_hand(gate, q[0, 0], size, initial, limit), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dense(gate(q, grid))[0, 0], expected, rtol=1e-12, atol=1e-12)


def test_a_new_gate_has_variance_one_and_a_wider_one_on_larger_grids():
    gate = GaussianGate(4, (14, 14)).requires_grad_(False)
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    same, larger = (gate(torch.randn(1, 2, n * n, 4), Grid(n, n)) for n in (14, 28))
    torch.testing.assert_close(same.variance_h, torch.full_like(same.variance_h, 1.1))
    torch.testing.assert_close(larger.variance_w, torch.full_like(larger.variance_w, 2.1))
    torch.testing.assert_close(same.amplitude, torch.full_like(same.amplitude, math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("initial", [(14, 14), (64, 64)])
def test_half_precision_stays_finite_on_large_grids(dtype, initial):
    decay = kinds.Gaussian(reference_grid=initial)
    attn = SpatialDecayAttention(8, 1, decay=decay, rope="none", lpe_kernel_size=0, gate_rank=0).to(dtype)
    x = (8 * torch.randn(1, 64, 64, 8)).to(dtype).requires_grad_()
    out = attn(x)
    (out.float().square().mean()).backward()
    for value in (out, x.grad, *(parameter.grad for parameter in attn.parameters())):
        assert value.isfinite().all()
    assert attn.decay.gaussian.log_var.weight.grad.abs().max() > 0


def test_attention_adds_the_gaussian_of_its_normed_queries():
    attn = SpatialDecayAttention(
        12, 3, decay="gaussian", qk_norm=True, rope="none", lpe_kernel_size=0, gate_rank=0, num_prefix_tokens=2
    ).double()
    x = torch.randn(2, 2 + 12, 12, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = attn.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        mask = dense(attn.decay.gaussian(q, Grid(3, 4, 2)))
        assert (mask[:, :, :2] == 0).all()
        assert (mask[:, :, :, :2] == 0).all()
        assert (mask[:, :, 2:, 2:] > 0).all()
        expected = torch.softmax(q @ k.mT / 2 + mask, -1) @ v
        torch.testing.assert_close(attn(x, (3, 4)), attn.proj(expected.transpose(1, 2).flatten(2)))
        torch.testing.assert_close(attn.decay(merge_heads(q), (3, 4)), mask)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"reference_grid must be \(H, W\), both >= 1: got \(0, 4\)"):
        GaussianGate(4, (0, 4))


class Adapter(torch.nn.Module):
    """What LoRA puts in a linear layer's place: the layer, and two small ones beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight = layer, layer.weight
        self.down, self.up = torch.nn.Linear(layer.in_features, 2), torch.nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    def merged(self):
        with torch.no_grad():
            self.layer.weight += self.up.weight @ self.down.weight
            self.layer.bias += self.up(self.down.bias)
        return self.layer


@pytest.mark.parametrize("name", ["log_var", "log_alpha"])
def test_adapters_of_its_linear_layers_count(name):
    """LoRA of all linear layers has these too: with no effect in training, a merge would change what was trained."""
    torch.manual_seed(0)
    gate, q, grid = GaussianGate(8, (4, 4)), torch.randn(1, 2, 16, 8), Grid(4, 4)
    adapter = Adapter(getattr(gate, name))
    setattr(gate, name, adapter)
    adapted = dense(gate(q, grid))
    adapted.sum().backward()
    assert adapter.up.weight.grad.abs().max() > 0
    setattr(gate, name, adapter.merged())
    torch.testing.assert_close(dense(gate(q, grid)), adapted)
