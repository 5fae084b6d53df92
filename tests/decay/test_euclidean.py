"""ALiBi in two dimensions: slopes and distances against loops, in every backend, with gradients."""

import pytest
import torch

from spatial_decay.decay import EuclideanDecay, alibi_slopes, dense
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import decay_attention
from tests import references
from tests.cases import CPU_BACKENDS, TOLERANCE, case_id, relative_error, widest_dtype


def test_slopes_of_alibi():
    for num_heads in range(1, 18):
        found = alibi_slopes(num_heads, device=torch.device("cpu"), dtype=torch.float64).tolist()
        assert found == pytest.approx(references.alibi_slopes(num_heads), rel=1e-15)
    assert references.alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert references.alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=case_id)
def test_the_euclidean_distance_has_gradients_where_it_is_0(dtype):
    """To positions, of which two tokens share one: that of the root is infinite, and times 0 it is NaN."""
    h, w = torch.tensor([[[0.0, 0.0, 3.0]], [[0.0, 0.0, 4.0]]], dtype=dtype)
    leaves = h.requires_grad_(), w.requires_grad_()
    mask = dense(EuclideanDecay(torch.full((1, 1, 3), -0.5, dtype=dtype), Positions(*leaves)))
    assert mask[0, 0].tolist() == [[0.0, 0.0, -5.0], [0.0, 0.0, -5.0], [-5.0, -5.0, 0.0]]
    of_h, of_w = torch.autograd.grad(mask.sum(), leaves)
    torch.testing.assert_close(of_h, torch.tensor([[1.2, 1.2, -2.4]], dtype=dtype))
    torch.testing.assert_close(of_w, torch.tensor([[1.6, 1.6, -3.2]], dtype=dtype))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_euclidean_strengths_against_loops_in_every_backend(backend, num_prefix):
    """Values, and gradients of q and of the strengths; the distances come from the loops of a slope of 1."""
    dtype, grid = widest_dtype(backend), Grid(5, 6, num_prefix)
    q, k, v, weight = torch.randn(4, 2, 3, grid.num_tokens, 4, dtype=dtype)
    leaves = q.requires_grad_(), (-torch.rand(2, 3, grid.num_tokens, dtype=dtype)).requires_grad_()
    out = decay_attention(leaves[0], k, v, EuclideanDecay(leaves[1], grid), backend=backend)
    found = [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    distances = torch.tensor(references.with_prefix(references.alibi(-1.0, 5, 6), num_prefix), dtype=torch.float64)
    q, strength = exact = [x.detach().double().requires_grad_() for x in leaves]
    scores = q @ k.double().mT / 2 + (strength[..., :, None] + strength[..., None, :]) * distances
    out = scores.softmax(-1) @ v.double()
    for got, right in zip(found, [out, *torch.autograd.grad((out * weight).sum(), exact)], strict=True):
        assert relative_error(got, right) < TOLERANCE[dtype]
