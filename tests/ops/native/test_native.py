"""Backend `native`: values and gradients against `math` in float64, for every formula, dtype, mask, layout and stride.

An error is the largest difference over the largest expected value, or over 0.1 where all are smaller. The decay's
numbers are the kernel's own, float32, in both: what float32 loses before, in cumulative sums, is not the kernel's.
"""

from functools import partial

import pytest
import torch

from spatial_decay.decay import AxialDecay, EuclideanDecay, GaussianDecay, ManhattanDecay, PathDecay, SquaredDecay
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import decay_attention
from spatial_decay.ops.native import library, operators
from tests.cases import TOLERANCE, case_id, needs_native, relative_error
from tests.ops.random_calls import difference

pytestmark = needs_native
TOLERANCES = {**TOLERANCE, torch.float16: 4e-3}
INFINITY = float("inf")

# By name: what makes the decay of its numbers, and how many it has.
KINDS = {
    "none": (lambda layout: None, 0),
    "manhattan": (lambda a, layout: ManhattanDecay(a, layout), 1),
    "euclidean": (lambda a, layout: EuclideanDecay(a, layout), 1),
    "squared": (lambda a, layout: SquaredDecay(a, layout), 1),
    "path": (lambda c, layout: PathDecay(c, layout), 1),
    "causal": (lambda c, layout: PathDecay(c, layout, causal=True), 1),
    "gaussian": (lambda a, h, w, layout: GaussianDecay(a, h, w, layout), 3),
    "gaussian-2": (lambda a, h, w, layout: GaussianDecay(a, h, w, layout, max_distance=2.0), 3),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make_numbers(kind, batch_size, num_heads, length):
    """Random ones of the kind's sign."""
    x = torch.rand(KINDS[kind][1], batch_size, num_heads, length)
    if kind in ("manhattan", "euclidean", "squared"):
        return [-0.3 * x[0]]
    if "gaussian" in kind:
        return [3 * x[0], 0.3 + 4 * x[1], 0.3 + 4 * x[2]]
    return [one.cumsum(-1) for one in x]


def make_leaves(kind, layout, *, batch_size=2, num_heads=3, head_dim=16, dtype=torch.float32, shared=False):
    """q, k and v as a ViT has them, (B, N, L, d) of (B, L, N, d), and the numbers."""
    length = layout.num_tokens
    heads = torch.randn(3, batch_size, length, num_heads, head_dim).to(dtype).transpose(2, 3)
    return [*heads, *make_numbers(kind, 1 if shared else batch_size, num_heads, length)]


def run(kind, layout, leaves, weight, **options):
    """Output and gradients of sum(weight * out)."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = decay_attention(*leaves[:3], KINDS[kind][0](*leaves[3:], layout=layout), **options)
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def compare(kind, layout, leaves, *, attn_mask=None, **options):
    """Assert that output and gradients are those of math; return them."""
    weight, dtype = torch.randn(leaves[0].shape, dtype=torch.float64), leaves[0].dtype
    results = run(kind, layout, leaves, weight, attn_mask=attn_mask, backend="native", **options)
    exact = [x.double() for x in leaves]
    expected = run(kind, layout, exact, weight, attn_mask=attn_mask, backend="math", **options)
    for name, got, right in zip(("out", "q", "k", "v", 1, 2, 3), results, expected, strict=False):
        assert difference(got, right, at_least=0.1) < TOLERANCES[dtype], name
    return results


LAYOUTS = [Grid(1, 1), Grid(1, 7), Grid(7, 1), Grid(5, 9, 3), Grid(14, 14, 1), Grid(12, 1, 4), Grid(17, 31)]


def layout_id(layout):
    return f"{layout.height}x{layout.width}+{layout.num_prefix_tokens}"


@kinds
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts(layout, kind):
    compare(kind, layout, make_leaves(kind, layout))


@kinds
@pytest.mark.parametrize("layout", [Grid(37, 37, 1), Grid(3, 400)], ids=layout_id)
def test_long_sequences(layout, kind):
    compare(kind, layout, make_leaves(kind, layout, batch_size=1, num_heads=1))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_half_precision(dtype, kind):
    compare(kind, Grid(5, 9, 1), make_leaves(kind, Grid(5, 9, 1), dtype=dtype))


@pytest.mark.parametrize("head_dim", [1, 2, 3, 7, 24, 32, 33, 64, 80, 96, 128, 200, 255, 256])
def test_head_dims(head_dim):
    compare("manhattan", Grid(5, 9), make_leaves("manhattan", Grid(5, 9), head_dim=head_dim))


@kinds
def test_numbers_that_images_share(kind):
    results = compare(kind, Grid(4, 5, 1), make_leaves(kind, Grid(4, 5, 1), shared=True))
    assert all(len(x) == 1 for x in results[4:])


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 5.0])
def test_scales(scale):
    compare("path", Grid(4, 5), make_leaves("path", Grid(4, 5)), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
def test_weights_are_at_most_1_beside_huge_scores(dtype):
    """The backward pass makes them again; tiles of bfloat16 add up a score of 1e9 otherwise than it does, by 100."""
    layout = Grid(5, 9)
    leaves = make_leaves("causal", layout, head_dim=32, dtype=dtype)
    out, _, _, dv, _ = run("causal", layout, leaves, torch.ones(leaves[0].shape), backend="native", scale=1e9)
    assert out.isfinite().all()
    assert (dv >= 0).all()
    assert (dv <= layout.num_tokens).all()


@kinds
@pytest.mark.parametrize("variant", library.variants() if library.reason() is None else [])
def test_every_instruction_set_of_this_machine(monkeypatch, variant, kind):
    kernel = library.kernel(variant)
    monkeypatch.setattr(library, "kernel", lambda: kernel)
    attn_mask = torch.randn(2, 1, 1, 46)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare(kind, Grid(5, 9, 1), make_leaves(kind, Grid(5, 9, 1), dtype=dtype, head_dim=24), attn_mask=attn_mask)


class TestMasks:
    """Also in ops/test_masks.py, with all backends."""

    LAYOUT = Grid(3, 6, 1)
    SHAPES = ((1, 1, 1, 19), (2, 1, 1, 19), (1, 3, 1, 19), (1, 1, 19, 19), (2, 1, 19, 19), (2, 3, 19, 19), (19,))

    @kinds
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, kind):
        """Bool, and added; query 2 may attend to nothing where queries differ."""
        may_attend = torch.rand(shape) > 0.3
        if may_attend.ndim == 4 and shape[2] > 1:
            may_attend[:, :, 2] = False
        compare(kind, self.LAYOUT, make_leaves(kind, self.LAYOUT), attn_mask=may_attend)
        added = torch.randn(shape).masked_fill(~may_attend, -INFINITY)
        out, dq, *_ = compare(kind, self.LAYOUT, make_leaves(kind, self.LAYOUT), attn_mask=added)
        if may_attend.ndim == 4 and shape[2] > 1:
            assert not out[:, :, 2].any()
            assert not dq[:, :, 2].any()

    @pytest.mark.parametrize("of_mask", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=case_id)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
    @pytest.mark.parametrize("num_rows", [1, 19])
    def test_dtypes(self, num_rows, dtype, of_mask):
        attn_mask = torch.randn(1, 3, num_rows, 19).to(of_mask)
        attn_mask[..., 3], attn_mask[..., 4] = torch.finfo(of_mask).min, -INFINITY
        compare("path", self.LAYOUT, make_leaves("path", self.LAYOUT, dtype=dtype), attn_mask=attn_mask)

    def test_an_image_of_padding_alone(self):
        attn_mask = torch.ones(2, 1, 1, 19, dtype=torch.bool)
        attn_mask[1] = False
        results = compare("path", self.LAYOUT, make_leaves("path", self.LAYOUT), attn_mask=attn_mask)
        assert all(not x[1].any() for x in results)

    @kinds
    @pytest.mark.parametrize("value", [-1e3, -1e4, -3e4, -99000.0])
    def test_whole_rows_far_away(self, value, kind):
        """The peak of a row and the logarithm of its sum have no sum in float32; and gradients must be those at 0."""
        attn_mask = torch.zeros(19, 19)
        attn_mask[[0, 4, 18]] = value
        compare(kind, self.LAYOUT, make_leaves(kind, self.LAYOUT), attn_mask=attn_mask)

    @kinds
    def test_rows_far_apart_of_different_values(self, kind):
        attn_mask = -9e4 * torch.rand(19, 1) + torch.randn(2, 3, 19, 19)
        compare(kind, self.LAYOUT, make_leaves(kind, self.LAYOUT), attn_mask=attn_mask)

    @pytest.mark.parametrize("size", [1e30, 1e34])
    def test_rows_without_anything_beside_huge_scores(self, size):
        """A score of 1e31 moves what stands for "nothing" in float32."""
        attn_mask = torch.rand(19, 19) > 0.5
        attn_mask[[0, 4]] = False
        q, k, v = make_leaves("none", self.LAYOUT)
        q.requires_grad_()
        out = decay_attention(size * q, k, v, attn_mask=attn_mask, backend="native")
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert not out[:, :, [0, 4]].any()
        assert not dq[:, :, [0, 4]].any()

    @pytest.mark.parametrize("num_rows", [1, 19])
    def test_any_strides(self, num_rows):
        whole = torch.randn(19, 2 * num_rows, 4, 38)
        views = [
            whole[:2, ::2, :3, ::2].transpose(1, 2),
            whole.permute(3, 2, 1, 0)[:2, :3, :num_rows],
            whole[:1, :num_rows, 0, 19:].expand(2, 3, -1, -1),
            whole[0, 0, 0, :19],
            whole[0, 0, 0, :1].expand(19, 19),
        ]
        for attn_mask in views:
            compare("path", self.LAYOUT, make_leaves("path", self.LAYOUT), attn_mask=attn_mask)
            compare("path", self.LAYOUT, make_leaves("path", self.LAYOUT), attn_mask=attn_mask > 0)


class TestPositions:
    @staticmethod
    def make(batch_size, *, has_gaps):
        h, w = torch.randint(0, 6, (2, batch_size, 23))  # some lie at one place
        known = torch.rand(batch_size, 23) > 0.3 if has_gaps else None
        return Positions(h, w, known)

    @kinds
    @pytest.mark.parametrize("has_gaps", [False, True], ids=["", "gaps"])
    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_equal_math(self, batch_size, has_gaps, kind):
        positions = self.make(batch_size, has_gaps=has_gaps)
        leaves = make_leaves(kind, positions)
        if kind in ("path", "causal"):
            leaves[3] = positions.running_sum(torch.rand(2, 3, 23), inclusive=False)
        compare(kind, positions, leaves)
        compare(kind, positions, leaves, attn_mask=torch.rand(2, 1, 23, 23) > 0.3)

    @pytest.mark.parametrize("kind", ["manhattan", "gaussian"])
    def test_between_the_grid(self, kind):
        positions = Positions(*(6 * torch.rand(2, 2, 23)))
        compare(kind, positions, make_leaves(kind, positions))


def strided(name, x):
    """The same numbers, otherwise in memory."""
    if name == "offset":
        return torch.cat([torch.full((7,), float("nan"), dtype=x.dtype), x.flatten()])[7:].view(x.shape)
    if name == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if name == "features apart":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if name == "every second":
        return torch.stack([x, torch.full_like(x, float("nan"))], 3)[:, :, :, 0]
    assert name == "one qkv"
    return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


@pytest.mark.parametrize("kind", ["path", "gaussian"])
@pytest.mark.parametrize("name", ["offset", "heads first", "features apart", "every second", "one qkv"])
def test_any_strides(name, kind):
    leaves = make_leaves(kind, Grid(4, 5, 1))
    weight = strided(name, torch.randn(leaves[0].shape))
    expected = run(kind, Grid(4, 5, 1), [x.contiguous() for x in leaves], weight, backend="native")
    moved = [*(strided(name, x) for x in leaves[:3]), *(x.mT.contiguous().mT for x in leaves[3:])]
    got = run(kind, Grid(4, 5, 1), moved, weight, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_expanded_tensors():
    layout = Grid(4, 5)
    q, k, v = torch.randn(3, 1, 1, 20, 8)
    a = -torch.rand(1, 1, 20)
    leaves = [q.expand(2, 3, -1, -1), k.expand(2, 3, -1, -1), v.expand(2, 3, -1, -1), a.expand(2, 3, -1)]
    compare("manhattan", layout, leaves)
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = decay_attention(*leaves[:3], ManhattanDecay(leaves[3], layout), backend="native")
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True))


@pytest.mark.parametrize("kind", ["none", "path", "gaussian"])
@pytest.mark.parametrize("batch_size", [0, 2])
def test_no_images_and_any_subset_of_gradients(batch_size, kind):
    layout = Grid(3, 4)
    leaves = make_leaves(kind, layout, batch_size=batch_size, shared=batch_size == 0)
    weight = torch.randn(leaves[0].shape)
    expected = run(kind, layout, leaves, weight, backend="native")
    for i in range(len(leaves)):
        some = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
        out = decay_attention(*some[:3], KINDS[kind][0](*some[3:], layout=layout), backend="native")
        (gradient,) = torch.autograd.grad((out * weight).sum(), [some[i]])
        assert gradient.shape == leaves[i].shape
        assert torch.equal(gradient.float(), expected[1 + i])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_results_repeat_bit_for_bit(dtype, kind):
    """For any number of threads; the numbers of threads among each other to within rounding."""
    before = torch.get_num_threads()
    try:
        for layout, num_heads in ((Grid(5, 6), 3), (Grid(24, 25, 1), 1)):
            leaves = make_leaves(kind, layout, num_heads=num_heads, batch_size=1, dtype=dtype)
            attend = partial(run, kind, layout, leaves, torch.randn(leaves[0].shape), backend="native")
            results = {}
            for num_threads in (1, 2, 5):
                torch.set_num_threads(num_threads)
                results[num_threads] = attend()
                assert all(torch.equal(a, b) for a, b in zip(results[num_threads], attend(), strict=True))
            for a, b, c in zip(*results.values(), strict=True):
                assert max(relative_error(a, c), relative_error(b, c)) < TOLERANCES[dtype]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("variance", [1e-30, 1e-38, 1e-45])
def test_a_gaussian_of_next_to_no_width(variance):
    """Its precision is infinite in float32, and times a step of 0 NaN; it reaches its own token alone."""
    layout = Grid(3, 4)
    leaves = make_leaves("gaussian", layout)
    leaves[4][:, :, 5] = variance
    results = run("gaussian", layout, leaves, torch.ones(leaves[0].shape), backend="native")
    assert all(x.isfinite().all() for x in results)
    leaves[4][:, :, 5] = 1e-3  # as narrow as can be told from it
    assert torch.equal(results[0], compare("gaussian", layout, leaves)[0])


def test_rows_and_columns_are_read_where_they_lie(monkeypatch):
    """And a mask too: no operand is a copy."""
    seen = []
    real = operators.run
    monkeypatch.setattr(operators, "run", lambda operands, *others: seen.append(operands) or real(operands, *others))
    qkv = torch.randn(2, 20, 3, 3, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attn_mask = torch.randn(2, 3, 20, 20).to(torch.bfloat16)
    rows = PathDecay(torch.rand(1, 3, 5).cumsum(-1), Grid(1, 5))
    columns = PathDecay(torch.rand(1, 3, 4).cumsum(-1), Grid(1, 4))
    decay_attention(q, k, v, AxialDecay(rows, columns, Grid(4, 5)), backend="native")
    decay_attention(q, k, v, attn_mask=attn_mask, backend="native")
    of_rows, of_columns, masked = seen
    for x in (*of_rows[:3], *of_columns[:2], *masked[:3]):
        assert x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert masked.mask.data_ptr() == attn_mask.data_ptr()
