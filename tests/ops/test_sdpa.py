"""Backend `sdpa`: what decides the kernel on CUDA. Without a GPU: the mask that is handed over, and the reasons."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention, sdpa
from spatial_decay.ops.inputs import Inputs
from tests.cases import CASES, TOLERANCE, TRAINED, case_id, make_gates, relative_error


@pytest.mark.parametrize("with_mask", [False, True], ids=["decay", "decay+attn_mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("num_prefix", [0, 1, 4])
def test_the_mask_is_aligned_for_cuda(monkeypatch, num_prefix, dtype, with_mask):
    grid = Grid(14, 14, num_prefix)
    q, k, v = torch.randn(3, 2, 4, grid.num_tokens, 32, dtype=dtype)
    decay = ManhattanDecay(-torch.rand(2, 4, grid.num_tokens), grid)
    attn_mask = torch.rand(2, 1, 1, grid.num_tokens) > 0.2 if with_mask else None
    expected = decay_attention(q, k, v, decay, attn_mask=attn_mask, backend="sdpa")

    seen = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(sdpa, "row_multiple", lambda device: 8)  # as on CUDA
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: seen.append(kw["attn_mask"]) or real(*a, **kw)
    )
    out = decay_attention(q, k, v, decay, attn_mask=attn_mask, backend="sdpa")
    [mask] = seen
    assert mask.dtype == dtype
    assert mask.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])  # 8 elements are 16 bytes in half precision
    assert relative_error(out, expected) < TOLERANCE[dtype]


def test_only_cuda_wants_alignment():
    assert sdpa.row_multiple(torch.device("cuda")) == 8
    assert sdpa.row_multiple(torch.device("cpu")) == 1


def test_a_mask_that_alone_needs_a_gradient_does_not_go_to_cuda_kernels():
    """PyTorch issue 148476: an illegal memory access in the backward pass."""
    trained = ManhattanDecay(torch.zeros(1, 1, 4, requires_grad=True), Grid(2, 2))
    frozen, training = (
        SimpleNamespace(is_cuda=True, requires_grad=False),
        SimpleNamespace(is_cuda=True, requires_grad=True),
    )

    def reasons(q, v, decay):
        return sdpa.unsupported_reasons(Inputs(q, frozen, v, decay=decay, attn_mask=None, dropout_p=0.0, scale=1.0))

    assert reasons(frozen, frozen, trained) == [
        "on cuda, only the decay requires grad (needs q, k or v to require grad too)"
    ]
    assert not reasons(frozen, training, trained)
    assert not reasons(frozen, frozen, None)
    with torch.no_grad():
        assert not reasons(frozen, frozen, trained)


def test_a_named_backend_gives_its_reasons(monkeypatch):
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    monkeypatch.setattr(sdpa, "unsupported_reasons", lambda *a, **kw: ["q is too blue", "k is too green"])
    with pytest.raises(NotImplementedError) as caught:
        decay_attention(q, q, q, backend="sdpa")
    assert str(caught.value) == (
        "backend='sdpa' cannot run these inputs:\n  - q is too blue\n  - k is too green\n"
        "Use backend='auto' or one of: math."
    )
    torch.testing.assert_close(decay_attention(q, q, q), decay_attention(q, q, q, backend="math"))


@pytest.fixture
def _on_cuda():
    with torch.device("cuda"):
        yield


def gpu_inputs(case, *, dtype, num_prefix=0):
    grid = Grid(14, 14, 0 if case.is_axial else num_prefix)
    q, k, v = torch.randn(3, 2, 4, grid.num_tokens, 32, dtype=dtype)
    return q, k, v, make_gates(case, 2, 4, grid.num_tokens, torch.float32), grid


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_on_cuda_it_equals_math_with_gradients(case, dtype, num_prefix):
    q, k, v, gates, grid = gpu_inputs(case, dtype=dtype, num_prefix=num_prefix)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]
    results = {}
    for backend in ("sdpa", "math"):
        out = decay_attention(q, k, v, case.build(gates, 4, grid), backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.float().square().sum(), leaves))
    for got, expected in zip(results["sdpa"], results["math"], strict=True):
        assert relative_error(got, expected) < 2 * TOLERANCE[dtype]  # gradients go through two roundings


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_on_cuda_only_the_gate_trains(case):
    q, k, v, gates, grid = gpu_inputs(case, dtype=torch.float32)
    for gate in gates:
        gate.requires_grad_()
    decay_attention(q, k, v, case.build(gates, 4, grid)).square().sum().backward()
    torch.cuda.synchronize()
    assert all(gate.grad.isfinite().all() for gate in gates)


@pytest.mark.gpu
@pytest.mark.usefixtures("_on_cuda")
def test_on_cuda_a_fixed_mask_gives_finite_gradients_where_cudnn_does_not():
    """PyTorch issue 196678: L % 128 == 64."""
    grid = Grid(8, 24)
    q, k, v = (torch.randn(2, 4, 192, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    decay = ManhattanDecay(-torch.rand(1, 4, 192), grid)
    decay_attention(q, k, v, decay, backend="sdpa").float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
