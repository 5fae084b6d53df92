"""torch.compile(fullgraph=True) equals eager, for the layer with every kind and for SDT-H."""

import shutil

import pytest
import torch

import spatial_decay as sd
from spatial_decay.layers.kinds import KINDS
from tests.cases import TWO_STAGES, relative_error

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


WITH_SCALES = TWO_STAGES | {"init_values": [None, 1e-6]}


def backward(module, x):
    """Output and gradients."""
    x = x.clone().requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


# One kind of each formula: fixed has the mask of full, fixed_decomposed that of decomposed, 1d half of bidirectional's.
OF_EACH_FORMULA = ("full", "bidirectional", "decomposed", "gaussian")


@needs_compiler
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "full" else pytest.mark.slow) for kind in OF_EACH_FORMULA]
)
def test_layer(kind):
    attn = sd.SpatialDecayAttention(32, 4, decay=kind)
    x = torch.randn(2, 5, 6, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(attn, fullgraph=True)(x), attn(x)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "auto") for kind in OF_EACH_FORMULA), pytest.param("squared", "lowrank", marks=pytest.mark.slow)],
)
def test_gradients_of_the_layer(kind, backend):
    """The backward graph that the compiler derives, without generating code for it."""
    attn = sd.SpatialDecayAttention(16, 2, decay=kind, backend=backend)
    x = torch.randn(2, 3, 4, 16)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    for got, expected in zip(backward(compiled, x), backward(attn, x), strict=True):
        assert relative_error(got, expected) < 1e-5


@needs_compiler
@pytest.mark.slow
def test_sdt_h():
    """A block of each arrangement and what stands before and between them; all other blocks are the same code."""
    model = sd.SDTH(10, **WITH_SCALES).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


# Below, backend="eager": one graph without breaks, and no code is generated.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "decomposed" not in kind])
def test_layer_is_one_graph_with_prefix_tokens_and_a_mask(kind):
    attn = sd.SpatialDecayAttention(32, 4, decay=kind, num_prefix_tokens=1)
    x = torch.randn(2, 1 + 30, 32)
    mask = torch.rand(31, 31) > 0.3
    compiled = torch.compile(attn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, (5, 6), mask), attn(x, (5, 6), mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_layer_is_one_graph_for_many_sizes(kind):
    # What is no part of the decay is there with one kind.
    rest = {} if kind == "full" else {"rope": "none", "lpe_kernel_size": 0}
    attn = sd.SpatialDecayAttention(32, 4, decay=kind, **rest)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((2, 5, 6), (3, 7, 4), (4, 9, 9)):
            x = torch.randn(*size, 32)
            torch.testing.assert_close(compiled(x), attn(x), rtol=1e-5, atol=1e-5)


def test_layer_is_one_graph_for_many_squares_behind_prefix_tokens():
    attn = sd.SpatialDecayAttention(32, 4, num_prefix_tokens=1)
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for side in (4, 5, 14):
            x = torch.randn(2, 1 + side * side, 32)
            torch.testing.assert_close(compiled(x), attn(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_is_one_graph_under_autocast(dtype):
    attn = sd.SpatialDecayAttention(32, 4)
    x = torch.randn(2, 5, 6, 32)
    with torch.autocast("cpu", dtype=dtype):
        compiled = torch.compile(attn, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, attn(x), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_sdt_h_is_one_graph_in_training_with_checkpointing():
    model = sd.SDTH(10, drop_path_rate=0.0, **WITH_SCALES)
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = backward(model, x)
    rounding = 1e-6 * max(e.detach().abs().max() for e in expected)  # all that a bias before a batch norm has
    for got, e in zip(backward(compiled, x), expected, strict=True):
        # Batch norm over 8 values in the last stage amplifies rounding.
        torch.testing.assert_close(got, e, rtol=0, atol=float(1e-4 * e.detach().abs().max() + rounding))
