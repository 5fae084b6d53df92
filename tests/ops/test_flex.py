"""Backend `flex`: FlexAttention's own arithmetic on our score functions, its compiled kernel, and what it cannot run.

The compiled kernel takes seconds to build, so most checks let FlexAttention write the scores out (backend="eager").
"""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from spatial_decay import SpatialDecayAttention
from spatial_decay.decay import GaussianDecay, ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention, flex
from tests.cases import CASES, TOLERANCE, case_id, make_gates, relative_error


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def _written_out(monkeypatch):
    torch.compiler.reset()  # torch compiles a function for a few inputs only
    compiled = torch.compile(flex_attention, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)


def both(case, grid, attn_mask=None, dtype=torch.float32):
    """Outputs of flex and of math."""
    q, k, v = torch.randn(3, 2, 3, grid.num_tokens, 16).to(dtype)
    decay = case.build(make_gates(case, 2, 3, grid.num_tokens, torch.float32), 3, grid)
    return [decay_attention(q, k, v, decay, attn_mask=attn_mask, backend=backend) for backend in ("flex", "math")]


@pytest.mark.usefixtures("_written_out")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_math(case):
    out, expected = both(case, Grid(3, 5, 0 if case.is_axial else 2))
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.usefixtures("_written_out")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1), (2, 3, 0, 1)])
def test_masks_of_every_shape(shape):
    grid = Grid(3, 4, 1)
    attn_mask = torch.randn(*shape[:2], shape[2] or grid.num_tokens, grid.num_tokens)
    attn_mask[..., -2:] = float("-inf")
    if not shape[2]:
        attn_mask[:, :, 5] = float("-inf")  # may attend to nothing
    out, expected = both(CASES[0], grid, attn_mask)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_the_compiled_kernel(dtype):
    torch.compiler.reset()
    grid = Grid(7, 9, 1)
    attn_mask = torch.ones(2, 1, 1, grid.num_tokens, dtype=torch.bool)
    attn_mask[1, ..., -9:] = False
    out, expected = both(CASES[0], grid, attn_mask, dtype)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.slow
def test_the_compiled_kernel_over_views_of_one_tensor():
    torch.compiler.reset()
    grid = Grid(3, 5, 1)
    q, k, v = torch.randn(3, 1, 2, grid.num_tokens, 16)
    decay = GaussianDecay(*(torch.rand(1, 2, grid.num_tokens, 3) + 0.1).unbind(-1), grid)
    out, expected = (decay_attention(q, k, v, decay, backend=backend) for backend in ("flex", "math"))
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("length", "head_dim"), [(24, 8), (56, 16), (24, 16)])
def test_where_the_compiled_kernel_is_wrong_it_refuses(length, head_dim):
    q = torch.randn(2, 4, length, head_dim)
    decay = ManhattanDecay(-torch.rand(2, 4, length), Grid(1, length))
    with pytest.raises(NotImplementedError, match=f"{length} tokens with head_dim={head_dim}"):
        decay_attention(q, q, q, decay, backend="flex")


def test_what_it_cannot_run():
    q = torch.randn(1, 1, 4, 8)
    decay = ManhattanDecay(-torch.rand(1, 1, 4), Grid(2, 2))
    with pytest.raises(NotImplementedError, match=r"dropout_p=0.5 \(needs 0\)"):
        decay_attention(q, q, q, decay, dropout_p=0.5, backend="flex")
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="attn_mask requires grad"):
        decay_attention(q, q, q, decay, attn_mask=torch.zeros(4, 4, requires_grad=True), backend="flex")
    with pytest.raises(NotImplementedError, match="float64"):
        decay_attention(q.double(), q.double(), q.double(), decay, backend="flex")
    trained = ManhattanDecay(torch.zeros(1, 1, 4, requires_grad=True), Grid(2, 2))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="on cpu, something requires grad"):
        decay_attention(q, q, q, trained, backend="flex")


def test_inside_a_compiled_model_it_says_so():
    attn = SpatialDecayAttention(16, 2, backend="flex")
    # torch 2.6 says only that there was an error, and where.
    with pytest.raises(Exception, match="on cpu, inside torch.compile PyTorch cannot build its kernel|Observed exc"):
        torch.compile(attn, fullgraph=True, backend="eager")(torch.randn(1, 9, 16))
