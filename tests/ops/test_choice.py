"""What "auto" chooses on the CPU, and that it says so."""

import pytest
import torch
from torch.autograd import forward_ad

from spatial_decay import explain_backend
from spatial_decay.decay import AxialDecay, ManhattanDecay
from spatial_decay.layers import SpatialDecayAttention
from spatial_decay.layout import Grid
from spatial_decay.ops import BACKENDS, choice, decay_attention
from spatial_decay.ops.inputs import checked_inputs
from spatial_decay.ops.native import library
from tests.cases import needs_native


def chosen(size, *, num_images=1, num_heads=4, is_training=False, dropout_p=0.0, dtype=torch.float32):
    """By auto, for content-aware decay over a grid."""
    grid = Grid(*size)
    q = torch.empty(num_images, num_heads, grid.num_tokens, 16, dtype=dtype, requires_grad=is_training)
    decay = ManhattanDecay(torch.zeros(1, num_heads, grid.num_tokens), grid)
    return choice.choose(checked_inputs(q, q, q, decay, None, dropout_p, None), "auto")


@pytest.fixture
def no_native(monkeypatch):
    """As where no compiler was found."""
    monkeypatch.setattr(library, "reason", lambda: "no kernel")


@needs_native
def test_the_native_kernel_comes_first():
    for size in ((4, 4), (1, 28), (28, 28)):
        assert chosen(size) == chosen(size, is_training=True) == chosen(size, dtype=torch.bfloat16) == "native"
    assert chosen((28, 28), dtype=torch.float64) == "tiled"
    assert chosen((28, 28), dropout_p=0.1) == "sdpa"


@needs_native
def test_without_anything_to_add_it_is_native_where_that_pays():
    def of(num_tokens, *, attn_mask=None, dtype=torch.float32):
        q = torch.empty(8, 4, num_tokens, 16, dtype=dtype)
        return choice.choose(checked_inputs(q, q, q, None, attn_mask, 0.0, None), "auto")

    assert of(16) == "sdpa"
    assert of(196) == of(196, dtype=torch.bfloat16) == "native"
    assert of(16, attn_mask=torch.zeros(16)) == "native"


def test_what_fits_in_the_cache_is_written_out(no_native):
    """28 x 28 by axes: 896 sequences of 28 tokens."""
    assert chosen((1, 28), num_images=8 * 28, is_training=True) == "math"
    assert chosen((1, 28), num_images=4 * 28) == "math"
    assert chosen((14, 14), num_images=1) == "math"


def test_what_does_not_goes_by_blocks(no_native):
    assert chosen((28, 28), is_training=False) == "tiled"
    assert chosen((32, 33), is_training=True) == "tiled"
    assert chosen((1, 56), num_images=8 * 56, is_training=True) == "tiled"
    assert chosen((1, 28), num_images=64 * 28, is_training=True) == "math"  # short sequences are no faster in blocks


def test_what_blocks_cannot_do_goes_to_sdpa(no_native):
    assert chosen((28, 28), dropout_p=0.1) == "sdpa"


def test_without_anything_to_add_it_is_sdpa(no_native):
    q = torch.randn(1, 1, 4, 8)
    assert choice.choose(checked_inputs(q, q, q, None, None, 0.0, None), "auto") == "sdpa"


def test_the_choice_is_explained(no_native):
    q = torch.randn(1, 1, 676, 8)
    decay = ManhattanDecay(-torch.rand(1, 1, 676), Grid(26, 26))
    assert explain_backend(q, q, q, decay, dropout_p=0.1) == (
        "math\n"
        "  triton cannot: q is on cpu (needs cuda); dropout_p=0.1 (needs 0)\n"
        "  native cannot: dropout_p=0.1 (needs 0); no kernel\n"
        "  lowrank cannot: ManhattanDecay (needs a decay with channels, as SquaredDecay is)\n"
        "  tiled cannot: dropout_p=0.1 (needs 0)\n"
        "  sdpa could: 0.46 million scores are faster written out (math), up to 0.52 million\n"
        "  flex cannot: dropout_p=0.1 (needs 0)\n"
        "  triton_autotune cannot: q is on cpu (needs cuda); dropout_p=0.1 (needs 0)"
    )
    q = q.expand(2, -1, -1, -1)  # 0.91 million
    assert explain_backend(q, q, q, decay).splitlines()[:2] == ["tiled", "  triton cannot: q is on cpu (needs cuda)"]


def test_each_axis_has_its_own_choice(no_native):
    gates = -torch.rand(2, 1, 4, 8 * 600)
    q = torch.randn(1, 4, 8 * 600, 8)
    text = explain_backend(q, q, q, AxialDecay.from_gates(*gates, Grid(8, 600)))
    firsts = [line for line in text.splitlines() if not line.startswith("  ")]
    assert firsts == ["along rows: tiled", "along columns: math"]


def test_auto_under_function_transforms(monkeypatch):
    """native and tiled have no rules for torch.func: auto takes another one, though they would pay."""
    monkeypatch.setattr(BACKENDS["math"], "_SMALL", 0)
    x = torch.randn(3, 1, 1, 36, 8, dtype=torch.float64)
    decay = ManhattanDecay(-torch.rand(1, 1, 36).double(), Grid(6, 6))

    def loss(q):
        return decay_attention(q, q, q, decay).square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(x)
    for one, of_one in zip(x, got, strict=True):
        one = one.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(one), one)[0], of_one)


@pytest.mark.parametrize("with_decay", [True, False])
def test_auto_under_forward_mode_and_transforms_of_one_tensor(with_decay):
    """It is the choice of all tensors, not of q alone."""
    q, k, a = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8), -torch.rand(1, 1, 9)
    tangents = torch.randn_like(k), torch.randn_like(a)

    def attend(k, a, backend="auto"):
        return decay_attention(q, k, k, ManhattanDecay(a, Grid(3, 3)) if with_decay else None, backend=backend)

    _, expected = torch.func.jvp(lambda k, a: attend(k, a, "math"), (k, a), tangents)
    torch.testing.assert_close(torch.func.jvp(attend, (k, a), tangents)[1], expected)
    with forward_ad.dual_level():
        out = attend(*(forward_ad.make_dual(x, tangent) for x, tangent in zip((k, a), tangents, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)


@pytest.mark.filterwarnings("ignore")  # of torch.jit's own age, and of sizes that become constants
def test_auto_takes_what_torch_jit_can_trace():
    q, decay = torch.randn(1, 1, 9, 8), ManhattanDecay(-torch.rand(1, 1, 9), Grid(3, 3))
    traced = torch.jit.trace(lambda q: decay_attention(q, q, q, decay), (q,))
    torch.testing.assert_close(traced(2 * q), decay_attention(2 * q, 2 * q, 2 * q, decay))


def test_a_mask_that_requires_grad_counts_where_gradients_are_made():
    q, attn_mask = torch.randn(1, 1, 4, 8), torch.zeros(4, 4, requires_grad=True)
    with torch.no_grad():
        assert "attn_mask requires grad" not in explain_backend(q, q, q, attn_mask=attn_mask)
    assert "attn_mask requires grad" in explain_backend(q, q, q, attn_mask=attn_mask)


@pytest.mark.parametrize("backend", ["native", "tiled", "flex"])
def test_a_named_backend_says_all_its_reasons(backend):
    q = torch.randn(1, 1, 4, 8)
    attn_mask = torch.zeros(4, 4, requires_grad=True)
    with pytest.raises(NotImplementedError) as caught:
        decay_attention(q, q, q, attn_mask=attn_mask, dropout_p=0.5, backend=backend)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"backend='{backend}' cannot run these inputs:"
    assert {"  - dropout_p=0.5 (needs 0)", "  - attn_mask requires grad (needs one without)"} <= set(lines)
    assert lines[-1] == "Use backend='auto' or one of: sdpa, math."


@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "tiled", "auto"])
def test_exported_programs(backend):
    """By name it is one operator of the program; auto leaves it out, so that the program needs no package."""
    attn = SpatialDecayAttention(16, 2, backend=backend).eval()
    x = torch.randn(2, 18, 19, 16)
    program = torch.export.export(attn, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), attn(x), rtol=1e-5, atol=1e-6)
    if hasattr(torch.compiler, "is_exporting"):  # torch 2.6 does not tell
        operators = {str(node.target) for node in program.graph.nodes}
        for name in ("native", "tiled"):
            assert (f"spatial_decay.{name}.default" in operators) == (backend == name)
