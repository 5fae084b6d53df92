"""Backend `native`: its operators, what they refuse, and its reasons."""

import re
import shutil

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from spatial_decay import SpatialDecayAttention, explain_backend
from spatial_decay.decay import GaussianDecay, ManhattanDecay, PathDecay
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import decay_attention
from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.native import build, call, library, operators
from tests.cases import needs_native, relative_error


def good(**changes):
    """Inputs of the operators: 2 images, 3 heads, 13 tokens."""
    q, k, v = torch.randn(3, 2, 1, 3, 13, 8)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "formula": "path",
        "numbers": torch.rand(1, 2, 3, 13).cumsum(-1),
        "mask": None,
        "mask_tops": None,
        "positions": None,
        "grid": [3, 4, 1],
        "scale": 0.3,
        "max_step": float("inf"),
    }
    return {**inputs, **changes}


@pytest.mark.skipif(library.parallel_for() is None, reason="needs torch 2.10 or newer")
@pytest.mark.skipif(not any(map(shutil.which, build._COMPILERS)), reason="needs a C++ compiler")
def test_where_there_is_a_compiler_there_is_a_kernel():
    """Else the tests that need it would be left out without a word."""
    assert library.reason() is None


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mask": torch.randn(2, 3, 13, 13), "mask_tops": torch.randn(2, 3, 13)}, id="float mask"),
        pytest.param({"formula": "none", "numbers": torch.empty(0, 1, 3, 13)}, id="none", marks=pytest.mark.slow),
        pytest.param(
            {"formula": "gaussian", "numbers": torch.rand(3, 1, 3, 13)}, id="gaussian", marks=pytest.mark.slow
        ),
        pytest.param(
            {
                **dict(zip("qkv", torch.randn(3, 2, 3, 13, 8), strict=True)),
                "mask": torch.rand(1, 1, 1, 13) > 0.2,
                "positions": torch.rand(2, 3, 13).round(),
                "grid": [1, 13, 0],
            },
            id="bool mask, positions",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_operators_are_well_made(changes):
    inputs = good(**changes)
    for name in ("q", "k", "v", "numbers"):
        inputs[name].requires_grad_()
    torch.library.opcheck(operators.forward, tuple(inputs.values()))
    with torch.no_grad():
        out, rows = operators.forward(*inputs.values())
        torch.library.opcheck(operators.backward, (torch.randn_like(out), out, rows, *inputs.values()))


@needs_native
@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.randn(2, 1, 3, 13, 9)},
        {"q": torch.randn(2, 3, 13, 8)},
        {"k": torch.randn(2, 1, 3, 12, 8)},
        {"v": torch.randn(1, 1, 3, 13, 8)},
        {"v": torch.randn(2, 1, 3, 13, 8).half()},
        dict(zip("qkv", torch.randn(3, 2, 1, 3, 13, 8, dtype=torch.float64), strict=True)),
        dict(zip("qkv", torch.randn(3, 2, 1, 3, 13, 257), strict=True)),
        {"formula": "video"},
        {"formula": "gaussian"},
        {"numbers": torch.rand(1, 2, 3, 12)},
        {"numbers": torch.rand(1, 3, 3, 13)},
        {"numbers": torch.rand(2, 3, 13)},
        {"numbers": torch.rand(1, 2, 3, 13).double()},
        {"mask": torch.randn(2, 3, 13, 13)},
        {"mask": torch.randn(2, 3, 13, 12), "mask_tops": torch.randn(2, 3, 13)},
        {"mask": torch.randn(2, 2, 13, 13), "mask_tops": torch.randn(2, 3, 13)},
        {"mask": torch.randn(13, 13), "mask_tops": torch.randn(2, 3, 13)},
        {"mask": torch.ones(13, 13, dtype=torch.int64)[None, None]},
        {"mask": torch.randn(2, 3, 13, 13), "mask_tops": torch.randn(2, 3, 12)},
        {"mask": torch.randn(2, 3, 13, 13), "mask_tops": torch.randn(2, 3, 13).double()},
        {"mask": torch.ones(2, 3, 13, 13) > 0, "mask_tops": torch.randn(2, 3, 13)},
        {"mask_tops": torch.randn(2, 3, 13)},
        {"grid": [3, 4, 0]},
        {"grid": [3, 4]},
        {"grid": [-3, -4, 1]},
        {"positions": torch.rand(2, 3, 13)},  # with an axis of lines
        {"positions": torch.rand(2, 2, 13)},
        {"positions": torch.rand(3, 3, 13)},
        {"positions": torch.rand(2, 13, 3).mT},
        {"positions": torch.rand(2, 3, 13).double()},
    ],
    ids=lambda changes: ", ".join(f"{name} {getattr(x, 'shape', x)}" for name, x in changes.items()),
)
def test_what_would_read_outside_is_refused(changes):
    with pytest.raises(ValueError, match=r"the operator spatial_decay::native needs"):
        operators.forward(*good(**changes).values())
    out, rows = operators.forward(*good().values())
    with pytest.raises(ValueError, match=r"the operator spatial_decay::native needs"):
        operators.backward(out, out, rows, *good(**changes).values())


@needs_native
def test_what_would_write_outside_is_refused():
    out, rows = operators.forward(*good().values())
    for wrong in (out[:1], out.half()):
        with pytest.raises(ValueError, match="grad and out must be as q"):
            operators.backward(wrong, out, rows, *good().values())
        with pytest.raises(ValueError, match="grad and out must be as q"):
            operators.backward(out, wrong, rows, *good().values())
    for wrong in (rows[:1], rows.double(), rows.mT.contiguous().mT):
        with pytest.raises(ValueError, match="rows must be"):
            operators.backward(out, out, wrong, *good().values())


@pytest.mark.parametrize(("code", "error"), [(1, MemoryError), (2, RuntimeError)])
def test_what_the_kernel_returns(monkeypatch, code, error):
    monkeypatch.setattr(library, "kernel", lambda: lambda *arguments: code)
    with pytest.raises(error, match="backend 'native'"):
        operators.forward(*good().values())


def test_the_problem_is_the_one_of_the_source():
    """Names and order of the fields, and that all have 8 bytes."""
    source = (build.FOLDER / "source" / "problem.h").read_text()
    body = re.sub("//.*", "", re.search(r"struct Problem \{(.*?)\n\};", source, re.DOTALL)[1])
    found = {}
    for declaration in body.split(";"):
        kind, *names = re.findall(r"\w+(?:\[\d\])?", declaration.replace("const ", "")) or [""]
        for name in names:
            code = {"int64_t": "q", "double": "d", "void": "P", "float": "P"}[kind]
            assert code != "P" or "*" in declaration
            found[name.split("[")[0]] = name.partition("[")[2].rstrip("]") + code
    fields = {name: code for names, code in call._FIELDS.items() for name in names.split()}
    assert list(found.items()) == list(fields.items())
    assert call._PROBLEM.size == 8 * sum(int(code[:-1] or 1) for code in fields.values())


@needs_native
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
def test_it_is_one_graph(with_mask):
    q, k, v = (torch.randn(2, 2, 30, 8, requires_grad=True) for _ in range(3))
    gate = (-torch.rand(2, 2, 30)).requires_grad_()
    attn_mask = torch.randn(2, 1, 1, 30) if with_mask else None

    def attend(q, k, v, gate):
        decay = PathDecay.from_gate(gate, Grid(5, 6))
        return decay_attention(q, k, v, decay, attn_mask=attn_mask, backend="native").square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(q, k, v, gate), [q, k, v, gate]) for f in (compiled, attend)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@needs_native
@pytest.mark.slow
def test_one_graph_for_many_sizes():
    attn = SpatialDecayAttention(32, 4, backend="native")
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 5, 6), (3, 7, 4), (4, 9, 9)):
            x = torch.randn(*size, 32)
            torch.testing.assert_close(compiled(x), attn(x), rtol=1e-5, atol=1e-5)


def test_numbers_of_a_gaussian_are_finite_however_narrow_it_is():
    """The Triton kernels read the same."""
    variances = torch.tensor([1.0, 1e-20, 1e-38, 1e-45]).view(1, 1, 4).requires_grad_()
    numbers = FORMULAS["gaussian"].lowered((torch.ones(1, 1, 4), variances, variances))
    numbers.sum().backward()
    assert numbers.isfinite().all()
    assert variances.grad.isfinite().all()
    assert numbers[1, 0, 0, 0] == 0.5


@needs_native
def test_inference_mode():
    with torch.inference_mode():
        q = torch.randn(1, 2, 12, 8)
        decay = ManhattanDecay(-torch.rand(1, 2, 12), Grid(3, 4))
        out = decay_attention(q, q, q, decay, backend="native")
        assert relative_error(out, decay_attention(q, q, q, decay, backend="math")) < 1e-5


def reasons(q, decay=None, **options):
    with pytest.raises(NotImplementedError) as caught:
        decay_attention(q, q, q, decay, backend="native", **options)
    first, *found, _ = str(caught.value).splitlines()
    assert first == "backend='native' cannot run these inputs:"
    return {reason.removeprefix("  - ") for reason in found}


class Doubled(ManhattanDecay):
    pass


def test_it_says_all_that_it_cannot(monkeypatch):
    monkeypatch.setattr(library, "reason", lambda: "no compiler was found")
    q = torch.randn(1, 1, 4, 257, dtype=torch.float64)
    decay = Doubled(torch.zeros(1, 1, 4), Grid(2, 2))
    assert reasons(q, decay, attn_mask=torch.zeros(4, 4, requires_grad=True), dropout_p=0.1) == {
        "Doubled (needs None or a ManhattanDecay, PathDecay, GaussianDecay, EuclideanDecay, SquaredDecay)",
        "torch.float64 (needs float32, bfloat16 or float16)",
        "head_dim=257 (needs 1 to 256)",
        "dropout_p=0.1 (needs 0)",
        "attn_mask requires grad (needs one without)",
        "no compiler was found",
    }
    assert "q is on meta (needs cpu)" in reasons(torch.empty(1, 1, 4, 8, device="meta"))
    q = torch.randn(1, 1, 4, 8)
    assert "  native cannot: no compiler was found" in explain_backend(q, q, q).splitlines()


@needs_native
def test_function_transforms_are_refused():
    q = torch.randn(1, 1, 4, 8)
    for wrapped in ("q", "k", "v", "attn_mask"):
        tensors = {"q": q, "k": q, "v": q}
        with pytest.raises(NotImplementedError, match="inside a torch.func transform"):
            torch.func.grad(
                lambda x, name=wrapped, tensors=tensors: decay_attention(**{**tensors, name: x}, backend="native").sum()
            )(q if wrapped != "attn_mask" else torch.zeros(4, 4))


@pytest.mark.filterwarnings("ignore")  # of torch.jit's own age, and of sizes that become constants
@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_forward_mode_and_tracing_are_refused(backend):
    """Else the tangent would be lost without a word."""
    q, a = torch.randn(1, 1, 4, 8), -torch.ones(1, 1, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(a, torch.ones_like(a))
        with pytest.raises(NotImplementedError, match="forward-mode derivatives(.|\n)*or one of: math[.]"):
            decay_attention(q, q, q, ManhattanDecay(dual, Grid(2, 2)), backend=backend)
    decay = ManhattanDecay(a, Grid(2, 2))
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda q: decay_attention(q, q, q, decay, backend=backend), (q,), check_trace=False)


@needs_native
def test_gradients_in_batches():
    """As torch.autograd.functional.jacobian(..., vectorize=True) asks for them."""
    leaves = [x.requires_grad_() for x in (*torch.randn(3, 1, 2, 12, 8), -torch.rand(1, 2, 12))]
    out = decay_attention(*leaves[:3], ManhattanDecay(leaves[3], Grid(3, 4)), backend="native")
    weights = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        single = torch.autograd.grad(out, leaves, weight, retain_graph=True)
        assert all(torch.equal(x[i], y) for x, y in zip(batched, single, strict=True))


@needs_native
def test_tensors_whose_memory_holds_other_numbers():
    """The imaginary part of a conjugate is negated when it is read, and a zero of autograd's has no memory."""
    q = torch.randn(1, 2, 12, 8)
    a, attn_mask = torch.randn(12, 12, dtype=torch.complex64).conj().imag.split([1, 11])
    a, attn_mask = -a.square()[None].expand(1, 2, -1), attn_mask[None, None, :1]
    for mask, strength in ((attn_mask, a), (None, torch.complex(a, -a).conj().imag)):
        assert strength.is_neg() or mask.is_neg()
        got, expected = (
            decay_attention(q, q, q, ManhattanDecay(strength, Grid(3, 4)), attn_mask=mask, backend=backend)
            for backend in ("native", "math")
        )
        assert relative_error(got, expected) < 1e-5
    zero = torch._efficientzerotensor(q.shape)
    assert not decay_attention(q, q, zero, backend="native").any()


@needs_native
def test_second_derivatives_are_refused():
    """Also where the gradient that comes in needs none: they must not be silently 0."""
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(decay_attention(q, q, q, backend="native").sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives. Use backend='math'"):
        gradient.sum().backward()


@needs_native
def test_checkpointing_calls_it_again():
    leaves = [torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3)]

    def attend(*leaves):
        return decay_attention(*leaves, ManhattanDecay(-torch.ones(1, 2, 12), Grid(3, 4)), backend="native").square()

    again = torch.autograd.grad(checkpoint(attend, *leaves, use_reentrant=False).sum(), leaves)
    for got, expected in zip(again, torch.autograd.grad(attend(*leaves).sum(), leaves), strict=True):
        assert torch.equal(got, expected)


@needs_native
@pytest.mark.parametrize(
    "decay",
    [
        None,
        GaussianDecay(*torch.ones(3, 1, 1, 9), Grid(3, 3), max_distance=1.0),
        PathDecay(torch.arange(9.0)[None, None], Positions(*torch.ones(2, 1, 9)), causal=True),
    ],
    ids=["none", "Gaussian with a limit", "causal at one place"],
)
def test_what_others_refuse_it_takes(decay):
    q = torch.randn(1, 1, 9, 4)
    out = decay_attention(q, q, q, decay, backend="native")
    assert relative_error(out, decay_attention(q, q, q, decay, backend="math")) < 1e-5
