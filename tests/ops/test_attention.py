"""decay_attention: every backend against the equations and against `math`, masks, autocast, gradients."""

import pytest
import torch
from torch import Tensor

from spatial_decay.decay import ManhattanDecay, dense
from spatial_decay.layout import Grid
from spatial_decay.ops import attention_weights, decay_attention
from tests import references
from tests.cases import (
    CASES,
    CPU_BACKENDS,
    EXACT_BACKENDS,
    PAIRWISE,
    TOLERANCE,
    TRAINED,
    case_id,
    make_gates,
    reference_mask,
    reference_of_head,
    relative_error,
    widest_dtype,
)

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)
exact_backends = pytest.mark.parametrize("backend", EXACT_BACKENDS)
fast_backends = pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "math"])
SIZES = [(1, 1), (1, 7), (7, 1), (3, 5)]


def inputs(case, grid, *, batch_size=2, num_heads=3, head_dim=8, dtype=torch.float64):
    q, k, v = torch.randn(3, batch_size, num_heads, grid.num_tokens, head_dim, dtype=torch.float64).to(dtype)
    gates = make_gates(case, batch_size, num_heads, grid.num_tokens, torch.promote_types(dtype, torch.float32))
    return q, k, v, gates


def reference(case, q, k, v, gates, grid, extra=None):
    """Eq. 10 or 12 by loops, (B, N, L, d); extra is an attn_mask (L, L)."""
    batch_size, num_heads, _, head_dim = q.shape
    scale = head_dim**-0.5
    out = torch.empty(q.shape, dtype=torch.float64)
    masks = None if case.is_axial else reference_mask(case, gates, num_heads, grid)
    for b in range(batch_size):
        for n in range(num_heads):
            of_head = [x[b, n].tolist() for x in (q, k, v)]
            if masks is None:
                columns, rows = reference_of_head(case, gates, b, n, num_heads, grid)
                extra_list = None if extra is None else extra.tolist()
                result = references.axial_attention(*of_head, columns, rows, *grid.size, scale, extra_list)
            else:
                mask = masks[b % masks.shape[0], n] + (0.0 if extra is None else extra)
                result = references.attention(*of_head, mask.tolist(), scale)
            out[b, n] = torch.tensor(result, dtype=torch.float64)
    return out


def assert_close(out, expected):
    """To within TOLERANCE of the output's dtype, absolutely too."""
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)


@backends
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_the_equations(case, size, num_prefix, backend):
    if case.is_axial and num_prefix:
        return  # refused, see tests/decay
    grid = Grid(*size, num_prefix)
    q, k, v, gates = inputs(case, grid, dtype=widest_dtype(backend))
    out = decay_attention(q, k, v, case.build(gates, 3, grid), backend=backend)
    assert_close(out, reference(case, q, k, v, gates, grid))


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "tiled"])
def test_without_decay_it_is_attention(backend):
    q, k, v = torch.randn(3, 2, 3, 10, 8, dtype=widest_dtype(backend))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    assert_close(decay_attention(q, k, v, scale=0.3, backend=backend), expected)


@fast_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("size", [(5, 9), (14, 14), (28, 28)], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_math(case, size, dtype, backend):
    grid = Grid(*size, 0 if case.is_axial else 1)
    q, k, v, gates = inputs(case, grid, batch_size=1, num_heads=2, head_dim=32, dtype=dtype)
    decay = case.build(gates, 2, grid)
    out = decay_attention(q, k, v, decay, backend=backend)
    assert out.dtype == dtype
    assert relative_error(out, decay_attention(q, k, v, decay, backend="math")) < TOLERANCE[dtype]


@backends
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_under_autocast(case, backend):
    grid = Grid(5, 6)
    q, k, v, gates = inputs(case, grid, dtype=torch.float32)
    decay = case.build(gates, 3, grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = decay_attention(q, k, v, decay, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = decay_attention(q, k, v, decay, backend="math")
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


def padding_mask(grid: Grid) -> Tensor:
    """Bool (L, L): the last two tokens are padding, query 1 may attend to nothing, some other pairs are off."""
    length = grid.num_tokens
    may_attend = torch.rand(length, length) > 0.2
    may_attend |= torch.eye(length, dtype=torch.bool)
    may_attend[:, -2:] = False
    may_attend[1] = False
    return may_attend


@backends
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attn_mask_adds_to_the_decay(case, as_float, backend):
    grid = Grid(3, 4, 0 if case.is_axial else 1)
    q, k, v, gates = inputs(case, grid, dtype=widest_dtype(backend))
    may_attend = padding_mask(grid)
    extra = torch.zeros(may_attend.shape, dtype=torch.float64).masked_fill(~may_attend, float("-inf"))
    if as_float:
        extra = extra + torch.randn(extra.shape, dtype=torch.float64)
    attn_mask = extra if as_float else may_attend
    expected = reference(case, q, k, v, gates, grid, extra)
    decay = case.build(gates, 3, grid)
    for shaped in (attn_mask, attn_mask.expand(2, 3, -1, -1), attn_mask[None]):
        out = decay_attention(q, k, v, decay, attn_mask=shaped, backend=backend)
        assert_close(out, expected)
    assert out[:, :, 1].abs().max() == 0 or case.is_axial  # a column of rows that are not empty may still fill it


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_row_that_may_attend_to_nothing_is_zero(case, dtype, backend):
    dtype = min(dtype, widest_dtype(backend), key=lambda x: x.itemsize)
    grid = Grid(3, 4)
    q, k, v, gates = inputs(case, grid, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]
    may_attend = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    may_attend[5] = False
    out = decay_attention(q, k, v, case.build(gates, 3, grid), attn_mask=may_attend, backend=backend)
    assert (out[:, :, 5] == 0).all()
    out.float().square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert (q.grad[:, :, 5] == 0).all()


@backends
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_key_padding_hides_the_padding(case, backend):
    grid = Grid(3, 4)
    q, k, v, gates = inputs(case, grid, dtype=widest_dtype(backend))
    keys = torch.ones(2, grid.num_tokens, dtype=torch.bool)
    keys[0, 8:] = False  # the last row of image 0 is padding
    keys[1, 3::4] = False  # the last column of image 1 is padding
    decay = case.build(gates, 3, grid)
    masked = decay_attention(q, k, v, decay, attn_mask=keys[:, None, None, :], backend=backend)
    hidden = ~keys[:, None, :, None]
    poisoned = [x.masked_fill(hidden, 1e3) for x in (k, v)]
    again = decay_attention(q, *poisoned, decay, attn_mask=keys[:, None, None, :], backend=backend)
    shown = keys[:, None, :, None].expand_as(masked)
    torch.testing.assert_close(masked[shown], again[shown])


@fast_backends
@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_gradients_equal_those_of_math(case, backend):
    grid = Grid(5, 6)
    q, k, v, gates = inputs(case, grid, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]
    weight = torch.randn(q.shape)
    grads = {}
    for name in (backend, "math"):
        out = decay_attention(q, k, v, case.build(gates, 3, grid), backend=name)
        grads[name] = torch.autograd.grad((out * weight).sum(), leaves)
    for got, expected in zip(grads[backend], grads["math"], strict=True):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


@exact_backends
@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_gradcheck(case, backend):
    grid = Grid(2, 3)
    q, k, v, gates = inputs(case, grid, batch_size=1, num_heads=1, head_dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]

    def attend(q, k, v, *gates):
        return decay_attention(q, k, v, case.build(gates, 1, grid), backend=backend)

    assert torch.autograd.gradcheck(attend, leaves)


@exact_backends
@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_only_the_gate_trains(case, backend):
    """PyTorch issue 148476: masks were the only input that required a gradient."""
    grid = Grid(2, 3)
    q, k, v, gates = inputs(case, grid, batch_size=1, num_heads=1, head_dim=2)
    for gate in gates:
        gate.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *gates: decay_attention(q, k, v, case.build(gates, 1, grid), backend=backend), gates
    )


@pytest.mark.parametrize("case", TRAINED, ids=case_id)
def test_math_has_second_derivatives(case):
    grid = Grid(2, 2)
    q, k, v, gates = inputs(case, grid, batch_size=1, num_heads=1, head_dim=2)
    leaves = [x.requires_grad_() for x in (q, k, v, *gates)]

    def attend(q, k, v, *gates):
        return decay_attention(q, k, v, case.build(gates, 1, grid), backend="math")

    assert torch.autograd.gradgradcheck(attend, leaves)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_attention_weights_are_those_of_the_values(case, masked):
    grid = Grid(3, 4)
    q, k, v, gates = inputs(case, grid)
    decay = case.build(gates, 3, grid)
    attn_mask = padding_mask(grid) if masked else None
    weights = attention_weights(q, k, decay, attn_mask=attn_mask)
    assert weights.shape == (2, 3, grid.num_tokens, grid.num_tokens)
    torch.testing.assert_close(weights @ v, decay_attention(q, k, v, decay, attn_mask=attn_mask))
    if not masked:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@backends
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_strides_do_not_matter(case, backend):
    grid, dtype = Grid(3, 5), widest_dtype(backend)
    gates = make_gates(case, 2, 3, grid.num_tokens)
    qkv = torch.randn(2, grid.num_tokens, 3, 3, 8, dtype=dtype)  # (B, L, three, N, d), as a ViT has it
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    decay = case.build(gates, 3, grid)
    out = decay_attention(q, k, v, decay, backend=backend)
    expected = decay_attention(q.contiguous(), k.contiguous(), v.contiguous(), decay, backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_dropout_drops(backend):
    q, k = torch.randn(2, 1, 2, 64, 8)
    v = torch.ones(1, 2, 64, 8)
    decay = ManhattanDecay(-torch.rand(1, 2, 64), Grid(8, 8))
    kept = decay_attention(q, k, v, decay, backend=backend)
    dropped = decay_attention(q, k, v, decay, dropout_p=0.5, backend=backend)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    assert (dropped - 1).abs().max() > 0.1
    assert (dropped.mean() - 1).abs() < 0.2  # 128 rows with a standard deviation of 0.5 to 1 each


def test_decay_is_added_once_and_dense_says_what():
    grid = Grid(4, 4)
    q = torch.zeros(1, 2, 16, 8)
    decay = ManhattanDecay(-torch.rand(1, 2, 16), grid)
    torch.testing.assert_close(attention_weights(q, q, decay), torch.softmax(dense(decay), -1))
