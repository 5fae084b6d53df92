"""Backend `triton`: which calls go past torch.library, and that nobody sees a difference but in their time."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention
from spatial_decay.ops.triton import launch, operators
from tests.cases import AXIAL, case_id
from tests.ops.test_triton import DEVICE, FULL, TOLERANCE, error, make, pytestmark, run  # noqa: F401  pytestmark
from tests.ops.test_triton import _interpreter as _interpreter

OPERATORS = ("forward", "backward", "short_forward", "short_backward")
GRIDS = pytest.mark.parametrize("grid", [Grid(2, 3, 1), Grid(2, 3)], ids=["long", "short"])


def leaves_of(grid):
    """q, k, v and the numbers of a decay, and a function of them."""
    q, k, v, _, decay = make(FULL, grid, num_heads=1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, decay.strength)]
    return leaves, lambda q, k, v, a: decay_attention(q, k, v, ManhattanDecay(a, grid), backend="triton")


@pytest.mark.parametrize("case", [FULL, AXIAL[0]], ids=case_id)
def test_plain_tensors_go_past_the_operators(monkeypatch, case):
    inputs = make(case, Grid(2, 3, int(not case.is_axial)), num_heads=1)
    for name in OPERATORS:
        monkeypatch.setattr(operators, name, lambda *_: pytest.fail("costs more time"))
    run(*inputs)
    with torch.no_grad():
        decay_attention(*inputs[:3], inputs[4], backend="triton")


@GRIDS
def test_traced_tensors_go_by_the_operators_and_get_the_same(monkeypatch, grid):
    leaves, attend = leaves_of(grid)
    expected = [out := attend(*leaves), *torch.autograd.grad(out.sum(), leaves)]
    traced = make_fx(lambda *x: attend(*x).detach())(*leaves)
    assert any("spatial_decay.triton" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(*leaves), expected[0])
    monkeypatch.setattr(operators, "are_plain", lambda *_: False)
    got = [out := attend(*leaves), *torch.autograd.grad(out.sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autograd_has_nothing_to_undo():
    """A view of the output, out[:, 0], has a gradient that fills and copies a tensor."""
    leaves, attend = leaves_of(Grid(2, 3))
    step = attend(*leaves).grad_fn
    assert step.name() == "_AttentionBackward"
    assert [x.name() for x, _ in step.next_functions if x][:3] == ["torch::autograd::AccumulateGrad"] * 3


@GRIDS
def test_gradients_in_batches(grid):
    """As torch.autograd.functional.jacobian(..., vectorize=True) asks for them."""
    leaves, attend = leaves_of(grid)
    out = attend(*leaves)
    weights = torch.randn(2, *out.shape, device=DEVICE)
    batched = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        single = torch.autograd.grad(out, leaves, weight, retain_graph=True)
        assert all(torch.equal(x[i], y) for x, y in zip(batched, single, strict=True))


@GRIDS
def test_second_derivatives_are_refused(grid):
    """Also where the gradient that comes in needs none: they must not be silently 0."""
    leaves, attend = leaves_of(grid)
    (gradient,) = torch.autograd.grad(attend(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives. Use backend='math'"):
        gradient.sum().backward()


def test_a_lazy_negative():
    """Whose memory holds other numbers than the tensor."""
    (q, k, v, a), attend = leaves_of(Grid(2, 3))
    negative = torch.complex(a, -a).detach().conj().imag
    assert negative.is_neg()
    assert error(attend(q, k, v, negative), attend(q, k, v, a).double()) < TOLERANCE[torch.float32]


def test_the_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    launch.capability_of.cache_clear()
    device = torch.device("cuda", 7)
    assert launch._has_warp_groups(device)
    assert launch._has_warp_groups(device)
    assert asked == [device]
    launch.capability_of.cache_clear()
