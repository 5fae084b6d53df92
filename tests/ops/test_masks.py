"""attn_mask: which of its values mean "may not attend", by which every backend goes; queries that are left nothing."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import spatial_decay as sd
from spatial_decay.decay import AxialDecay, ManhattanDecay, PathDecay, dense
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention
from tests.cases import CPU_BACKENDS, TOLERANCE, case_id, relative_error, widest_dtype
from tests.ops.random_calls import attend

ROOT = Path(__file__).parents[2]
GRID = Grid(3, 4)
LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
backends = pytest.mark.parametrize("backend", CPU_BACKENDS)


def inputs(dtype=torch.float32):
    q, k, v = (torch.randn(2, 3, 12, 8).to(dtype).requires_grad_() for _ in range(3))
    strength = -0.1 * torch.rand(2, 3, 12, dtype=torch.promote_types(dtype, torch.float32))
    return q, k, v, strength.requires_grad_()


def exact(q, k, v, strength, extra):
    """Output and gradients of sum(out ** 2), float64; extra is added as it is, -inf where a query may not attend."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, strength)]
    q, k, v, strength = leaves
    out = attend(q, k, v, dense(ManhattanDecay(strength, GRID)) + extra, 8**-0.5)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)


def compare(leaves, attn_mask, extra, backend, tolerance):
    q, k, v, strength = leaves
    out = decay_attention(q, k, v, ManhattanDecay(strength, GRID), attn_mask=attn_mask, backend=backend)
    wanted, wanted_gradients = exact(*leaves, extra)
    assert relative_error(out, wanted) < tolerance
    gradients = torch.autograd.grad(out.double().square().sum(), leaves)
    for got, right in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(got, right) < 3 * tolerance  # of a square: the output's own error comes in twice
    return out, gradients


def whole_row_values(dtype):
    """From -1e4 to the lowest, and whether they are added or mean that the query may attend to nothing."""
    lowest = LOWEST[dtype]
    added = [-1e4, -3e4] + [-9e4] * (dtype != torch.float16)
    forbidden = [lowest / 2, lowest, -float("inf")] + [-1e5, -1e6, -1e9, -1e30] * (dtype != torch.float16)
    return [(value, False) for value in added] + [(value, True) for value in forbidden]


@backends
@pytest.mark.parametrize("dtype", LOWEST, ids=case_id)
def test_whole_rows_at_any_value(dtype, backend):
    """PyTorch's own flash kernel for CPUs has gradients L times too large in such a row, see below."""
    of_q = min(dtype, widest_dtype(backend), key=lambda x: x.itemsize)
    for value, is_forbidden in whole_row_values(dtype):
        attn_mask = torch.zeros(2, 1, 12, 12, dtype=dtype)
        attn_mask[0, 0, [2, 5]] = value
        extra = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
        extra[0, 0, [2, 5]] = -float("inf") if is_forbidden else 0.0
        tolerance = {torch.float16: 4e-3, **TOLERANCE}[of_q]
        out, gradients = compare(inputs(of_q), attn_mask, extra, backend, tolerance)
        assert ((out[0, :, [2, 5]] == 0).all()) == is_forbidden, value
        if is_forbidden:
            assert (gradients[0][0, :, [2, 5]] == 0).all()


@backends
@pytest.mark.parametrize(
    ("value", "dtype", "of_q", "is_forbidden"),
    [
        (-32752.0, torch.float16, torch.float32, True),  # half of its own lowest; of float32 it would be a number
        (-32752.0, torch.float32, torch.float16, False),
        (-70000.0, torch.float32, torch.float16, False),  # a number, though float16 does not reach so far
        (-1e5, torch.bfloat16, torch.float32, True),  # which is -99840 there
        (-99840.0, torch.float32, torch.bfloat16, False),
        (LOWEST[torch.float32], torch.float64, torch.float64, True),
    ],
)
def test_a_value_is_judged_in_the_masks_own_dtype(value, dtype, of_q, is_forbidden, backend):
    attn_mask = torch.full((1, 1, 1, 12), value, dtype=dtype)
    of_q = min(of_q, widest_dtype(backend), key=lambda x: x.itemsize)
    q, k, v, strength = inputs(of_q)
    out = decay_attention(q, k, v, ManhattanDecay(strength, GRID), attn_mask=attn_mask, backend=backend)
    if is_forbidden:
        assert (out == 0).all()
    else:  # the same for all keys: it says nothing
        wanted, _ = exact(q, k, v, strength, torch.zeros(1, dtype=torch.float64))
        assert relative_error(out, wanted) < {torch.float16: 4e-3, **TOLERANCE}[of_q]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_what_is_left_of_a_row_keeps_its_digits(dtype, backend):
    """Two keys are left, as far as each other from the first query, at -25: bfloat16 has steps of 0.125 there."""
    q, k, v, _ = inputs(dtype)
    q = torch.zeros_like(q)  # so that the decay alone decides
    strength = -3.1 - 0.05 * torch.rand(2, 3, 12)
    attn_mask = torch.zeros(12, dtype=torch.bool)
    attn_mask[[7, 10]] = True
    with torch.no_grad():
        out = decay_attention(q, k, v, ManhattanDecay(strength, GRID), attn_mask=attn_mask, backend=backend)
    extra = torch.zeros(12, dtype=torch.float64).masked_fill(~attn_mask, -float("inf"))
    assert relative_error(out, exact(q, k, v, strength, extra)[0]) < TOLERANCE[dtype]


@backends
def test_far_values_before_a_causal_path(backend):
    """What the decay hides does not count for what a row is added less."""
    q, k, v, _ = inputs()
    gate = -torch.rand(2, 3, 12)
    attn_mask = torch.full((12, 12), -90000.0).masked_fill(torch.ones(12, 12).triu(1) > 0, 0.0)
    with torch.no_grad():
        out = decay_attention(
            q, k, v, PathDecay.from_gate(gate, GRID, causal=True), attn_mask=attn_mask, backend=backend
        )
        wanted = decay_attention(q, k, v, PathDecay.from_gate(gate, GRID, causal=True), backend="math")
    assert relative_error(out, wanted) < TOLERANCE[torch.float32]


@backends
def test_padded_queries_as_naflex_writes_them(backend):
    from timm.models.naflexvit import create_attention_mask

    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 9:] = False
    attn_mask = create_attention_mask(valid, num_prefix_tokens=0, symmetric=True, dtype=torch.float32)
    assert (attn_mask[0, 0, 9:] == LOWEST[torch.float32]).all()
    extra = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(attn_mask < 0, -float("inf"))
    out, gradients = compare(inputs(), attn_mask, extra, backend, TOLERANCE[torch.float32])
    assert (out[0, :, 9:] == 0).all()
    assert all((x[0, :, 9:] == 0).all() for x in gradients)


@backends
def test_padded_images_as_transformers_writes_them(backend):
    """A key mask of the dtype's lowest number; an image of padding alone may attend to nothing."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0], valid[1, 7:] = False, False
    attn_mask = eager_mask(2, 12, 12, mask_function=bidirectional_mask_function, attention_mask=valid)
    extra = torch.zeros(attn_mask.shape, dtype=torch.float64).masked_fill(attn_mask < 0, -float("inf"))
    out, gradients = compare(inputs(), attn_mask, extra, backend, TOLERANCE[torch.float32])
    assert (out[0] == 0).all()
    assert all((x[0] == 0).all() for x in gradients)


def test_pytorchs_flash_kernel_for_cpus_is_wrong_in_rows_of_the_lowest_number():
    """Its gradient in such a row is that of L times the weights; PyTorch's written-out kernel has it right."""
    q, k, v = (x.detach() for x in inputs()[:3])
    attn_mask = torch.zeros(12, 12)
    attn_mask[2] = LOWEST[torch.float32]

    def gradient(kernel):
        leaf = v.clone().requires_grad_()
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, leaf, attn_mask=attn_mask).square().sum().backward()
        return leaf.grad

    error = relative_error(gradient(SDPBackend.FLASH_ATTENTION), gradient(SDPBackend.MATH))
    assert error > 0.1, "mended upstream: say so in docs/concepts/precision.md"


def test_a_mask_over_pairs_without_a_decay_is_not_copied(monkeypatch):
    q, k, v, _ = inputs()
    seen, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: seen.append(kw["attn_mask"]) or real(*a, **kw)
    )
    hidden = torch.rand(2, 1, 12, 12) < 0.5
    hidden[..., 0] = False
    as_float = torch.zeros(hidden.shape).masked_fill(hidden, LOWEST[torch.float32])
    attend = partial(decay_attention, q, k, v, backend="sdpa")
    torch.testing.assert_close(attend(attn_mask=as_float), attend(attn_mask=~hidden))
    assert [mask.data_ptr() for mask in seen] == [as_float.data_ptr(), seen[1].data_ptr()]
    assert seen[1].dtype == torch.bool
    hidden[0, 0, 3] = True  # a row that may attend to nothing has to be seen to
    assert (attend(attn_mask=torch.zeros(hidden.shape).masked_fill(hidden, -1e5))[0, :, 3] == 0).all()
    assert seen[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", LOWEST, ids=case_id)
def test_far_scores_do_not_reach_over_forbidden_values(dtype):
    """Padding may be of any size: its scores are higher than -1e5 is low."""
    q, k, v = (x.detach().clone() for x in inputs(dtype)[:3])
    q, k[:, :, 5] = 100 * q, 1000 * k[:, :, 5]
    may_attend = torch.ones(12, 12, dtype=torch.bool)
    may_attend[:, 5] = False
    attn_mask = torch.zeros(12, 12, dtype=dtype).masked_fill(~may_attend, max(-1e5, LOWEST[dtype] / 2))
    out, wanted = (decay_attention(q, k, v, attn_mask=mask, backend="sdpa") for mask in (attn_mask, may_attend))
    assert relative_error(out, wanted) < 1e-6


@backends
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_queries_that_a_mask_and_a_causal_axis_leave_nothing(axis, backend):
    decays = {name: PathDecay(torch.zeros(1, 3, size), Grid(1, size)) for name, size in (("rows", 4), ("columns", 3))}
    decays[axis] = PathDecay(decays[axis].cumulative, decays[axis].layout, causal=True)
    attn_mask = torch.ones(12, 12, dtype=torch.bool)
    attn_mask[0, 0] = False  # nothing is before it
    with torch.no_grad():
        out = decay_attention(*inputs()[:3], AxialDecay(**decays, layout=GRID), attn_mask=attn_mask, backend=backend)
    assert out.isfinite().all()
    assert (out[:, :, 0] == 0).all() == (axis == "columns")  # else its column adds what the others took


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [partial(torch.jit.trace, check_trace=False), lambda f, x: make_fx(f)(*x)])
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_what_is_traced_holds_for_other_masks(backend, trace):
    q, k, v = (x.detach() for x in inputs()[:3])

    def attend(attn_mask):
        return decay_attention(q, k, v, attn_mask=attn_mask, backend=backend)

    attn_mask = torch.zeros(12, 12)
    traced = trace(attend, (attn_mask.clone(),))
    attn_mask[2] = LOWEST[torch.float32]
    attn_mask[3] = -9000.0
    torch.testing.assert_close(traced(attn_mask), attend(attn_mask))


@backends
@pytest.mark.parametrize("shape", [(12, 12), (12,), (0, 1, 12, 12)])
def test_no_images(shape, backend):
    q, k, v = torch.randn(3, 0, 3, 12, 8, requires_grad=True)
    decay = ManhattanDecay(-torch.rand(1, 3, 12), GRID)
    out = decay_attention(q, k, v, decay, attn_mask=torch.zeros(shape), backend=backend)
    out.sum().backward()
    assert out.shape == q.shape


def test_none_in_a_swapped_model_is_the_hosts_own_softmax():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    x = torch.randn(1, 3, 32, 32)
    attn_mask = torch.zeros(5, 5)
    attn_mask[1] = LOWEST[torch.float32]  # PyTorch's softmax makes it the mean of all
    features = {}
    for kind in ("", "none"):
        if kind:
            sd.swap_attention(model, kind)
        with torch.no_grad():
            features[kind] = model.forward_features(x, attn_mask=attn_mask)
    assert features[""].equal(features["none"])


class TestScale:
    @pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), "0.5", True], ids=repr)
    def test_must_be_a_number(self, scale):
        """A gradient at 64 tokens and none at 1,600."""
        with pytest.raises(TypeError, match="scale must be a number: got (Tensor|str|bool).*multiply q by it"):
            decay_attention(*torch.randn(3, 1, 1, 4, 2), scale=scale)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_must_be_finite(self, scale):
        with pytest.raises(ValueError, match="scale must be finite: got"):
            decay_attention(*torch.randn(3, 1, 1, 4, 2), scale=scale)

    def test_may_vary_in_compiled_code(self):
        @partial(torch.compile, backend="eager", fullgraph=True, dynamic=True)
        def attend(q, scale):
            return decay_attention(q, q, q, scale=scale, backend="math")

        q = torch.randn(1, 2, 4, 8)
        for scale in (0.5, 0.25, 2.0):
            torch.testing.assert_close(attend(q, scale), decay_attention(q, q, q, scale=scale, backend="math"))


@pytest.mark.slow
def test_random_calls_equal_the_loops():
    """By default the command has another seed, so that a run by hand sees other calls."""
    command = [sys.executable, "-m", "tests.ops.random_calls", "--calls", "1000", "--seed", "7", "--backends"]
    backends = ["auto", "math", "sdpa", "tiled", "native"] * 10 + ["triton"] * 2
    done = subprocess.run([*command, *backends], capture_output=True, text=True, check=False, cwd=ROOT)
    assert "1000 calls of seed 7: 0 wrong" in done.stdout, done.stdout + done.stderr
