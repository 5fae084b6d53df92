"""Tokens that fill no grid: against loops over the tokens that are there, and against whole grids."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import flex_attention

import spatial_decay as sd
from spatial_decay.decay import AxialDecay, dense
from spatial_decay.layout import Grid, Positions
from spatial_decay.ops import decay_attention, flex
from tests import references
from tests.cases import (
    CPU_BACKENDS,
    PAIRWISE,
    case_id,
    make_gates,
    reference_mask_of_positions,
    relative_error,
)

SIZE = (4, 5)
SUBSETS = [[17, 3, 8, 0, 12, 19, 4], [2, 11, 10, 1, 16, 9, 18]]  # of 20 patches, in no order


tensor = partial(torch.tensor, dtype=torch.float64)


def placed(num_prefix=2, num_suffix=1):
    """Two images' subsets between tokens that lie nowhere, whose coordinates are nonsense."""
    indices = torch.tensor(SUBSETS)
    coordinates = torch.stack([indices // SIZE[1], indices % SIZE[1]], -1).double()
    positions = Positions.of_coordinates(coordinates, num_prefix_tokens=num_prefix, num_suffix_tokens=num_suffix)
    known = positions.has_position
    return Positions(*(axis.masked_fill(~known, float("nan")) for axis in (positions.h, positions.w)), known)


expected_mask = partial(reference_mask_of_positions, num_heads=2, size=SIZE)


@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_dense_is_the_equation_over_the_tokens_that_are_there(case):
    positions = placed()
    gates = [gate.requires_grad_() for gate in make_gates(case, 2, 2, positions.num_tokens)]
    mask = dense(case.build(gates, 2, positions))
    torch.testing.assert_close(
        mask.expand(2, -1, -1, -1), expected_mask(case, gates, positions=positions), rtol=1e-12, atol=1e-12
    )
    if gates:
        mask[mask.isfinite()].sum().backward()
        assert all(gate.grad.isfinite().all() for gate in gates)


@pytest.fixture
def _written_out(monkeypatch):
    """FlexAttention, whose kernel takes 8 seconds to compile, writes the scores out."""
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, backend="eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)


@pytest.mark.slow
def test_the_compiled_kernel_of_flex():
    torch.compiler.reset()
    check_backend(PAIRWISE[0], "flex")


@pytest.mark.usefixtures("_written_out")
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "flex"])  # Triton's: ops/test_triton.py
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_backends_agree_or_say_why_not(case, backend):
    check_backend(case, backend)


def attend_at(h, w, heads, strength, *, build=sd.decay.ManhattanDecay, backend="auto"):
    return decay_attention(*heads, build(strength, Positions(h, w)), backend=backend)


def numbers_at_positions(dtype=torch.float32):
    """h, w, q, k, v and the strength of a decay."""
    h, w = 3 * torch.rand(2, 2, 7, dtype=dtype)
    return h, w, torch.randn(3, 2, 2, 7, 8, dtype=dtype), -torch.rand(2, 2, 7, dtype=dtype)


@pytest.mark.parametrize("of_one", [0, 1], ids=["h", "w"])
@pytest.mark.parametrize("build", [sd.decay.ManhattanDecay, sd.decay.EuclideanDecay, sd.decay.SquaredDecay])
def test_positions_have_gradients(build, of_one):
    *axes, heads, strength = numbers_at_positions()
    axes[of_one].requires_grad_()
    found = {
        backend: torch.autograd.grad(
            attend_at(*axes, heads, strength, build=build, backend=backend).square().sum(), axes[of_one]
        )[0]
        for backend in ("auto", "math", "sdpa", *(["lowrank"] if build is sd.decay.SquaredDecay else []))
    }
    assert found["math"].any()
    for gradient in found.values():
        assert relative_error(gradient, found["math"].double()) < 1e-5
    for backend in ("native", "tiled", "flex"):
        with pytest.raises(NotImplementedError, match="the positions of tokens require grad"):
            attend_at(*axes, heads, strength, build=build, backend=backend)
    with torch.no_grad():
        assert "require grad" not in sd.explain_backend(*heads, build(strength, Positions(*axes)))


def test_positions_have_tangents_and_transforms():
    h, w, heads, strength = numbers_at_positions(torch.float64)
    tangent = torch.randn_like(h)

    def output(h, backend="auto"):
        return attend_at(h, w, heads, strength, backend=backend)

    expected, of_tangent = torch.func.jvp(partial(output, backend="math"), (h,), (tangent,))
    for dtype in (torch.float64, torch.float32):
        heads, strength = heads.to(dtype), strength.to(dtype)
        assert relative_error(torch.func.jvp(output, (h,), (tangent,))[1], of_tangent) < 1e-5
        assert relative_error(torch.func.vmap(output)(h[None])[0], expected) < 1e-5
        gradient = torch.func.grad(lambda h: output(h).square().sum())(h)
        assert (gradient * tangent).sum().item() == pytest.approx((2 * expected * of_tangent).sum().item(), rel=1e-4)
        with forward_ad.dual_level():
            out = output(forward_ad.make_dual(h, tangent))
            assert relative_error(forward_ad.unpack_dual(out).tangent, of_tangent) < 1e-5


def test_positions_have_gradients_through_rotary_embedding_and_decay():
    h, w = (3 * torch.rand(2, 2, 7)).requires_grad_()
    layer = sd.SpatialDecayAttention(16, 2, rope="axial", lpe_kernel_size=0)
    x = torch.randn(2, 7, 16)

    def gradients(run):
        return torch.autograd.grad(run(x, layout=Positions(h, w)).square().sum(), (h, w))

    found = gradients(layer), gradients(torch.compile(layer, fullgraph=True, backend="eager"))
    layer.attention.backend = "math"
    for expected, *others in zip(gradients(layer), *found, strict=True):
        assert all(relative_error(other, expected.double()) < 1e-5 for other in others)


def check_backend(case, backend):
    positions = placed()
    dtype = torch.float32 if backend in ("native", "flex") else torch.float64
    gates = make_gates(case, 2, 2, positions.num_tokens, dtype=dtype)
    q, k, v = torch.randn(3, 2, 2, positions.num_tokens, 8, dtype=dtype)
    decay = case.build(gates, 2, positions)
    if backend == "tiled":
        with pytest.raises(NotImplementedError, match=r"Positions of their own \(needs those of a Grid\)"):
            decay_attention(q, k, v, decay, backend=backend)
        return
    mask = expected_mask(case, [gate.double() for gate in gates], positions=positions)
    with torch.no_grad():
        out = decay_attention(q, k, v, decay, backend=backend)
    for b in range(2):
        for n in range(2):
            head = [x[b, n].double().tolist() for x in (q, k, v)]
            expected = tensor(references.attention(*head, mask[b, n].tolist(), 8**-0.5))
            assert relative_error(out[b, n], expected) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", ["full", "fixed", "1d", "bidirectional", "squared", "none"])
def test_a_shuffled_grid_gives_the_shuffled_output(kind):
    layer = sd.SpatialDecayAttention(16, 2, decay=kind, num_prefix_tokens=1, lpe_kernel_size=0).double()
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    order = torch.stack([torch.randperm(20) for _ in range(2)])
    positions = Positions.of_subset(order, Grid(*SIZE, num_prefix_tokens=1))
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), order + 1], 1)[..., None].expand(-1, -1, 16)
    out = layer(x.gather(1, rows), layout=positions)
    assert relative_error(out, layer(x, SIZE).gather(1, rows)) < 1e-12


@pytest.mark.parametrize(("num_prefix", "num_suffix"), [(3, 0), (0, 3)], ids=["text first, Flux", "text last, SD3"])
def test_text_beside_an_image_has_no_decay(num_prefix, num_suffix):
    mask = sd.SpatialDecayMask(16, 2)
    image, text = torch.randn(2, 20, 16), torch.randn(2, 3, 16)
    h, w = Grid(*SIZE).positions(device=image.device, dtype=torch.float32)
    positions = Positions.of_coordinates(
        torch.stack([h, w], -1)[None], num_prefix_tokens=num_prefix, num_suffix_tokens=num_suffix
    )
    got = mask(torch.cat([text, image] if num_prefix else [image, text], 1), layout=positions)
    among_patches = mask(image, SIZE)
    patches = slice(num_prefix, num_prefix + 20)
    torch.testing.assert_close(got[:, :, patches, patches], among_patches)
    got = got.clone()
    got[:, :, patches, patches] = 0
    assert not got.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=case_id)
def test_packed_images_of_several_sizes_are_each_alone(dtype):
    """NaFlex: images of 4 x 5 and 2 x 3 patches, the second padded; coordinates of padding are out of fp16's range."""
    layer = sd.SpatialDecayAttention(16, 2, rope="none", lpe_kernel_size=0).to(dtype)
    x = torch.randn(2, 20, 16, dtype=dtype)
    coordinates = torch.full((2, 20, 2), 70_000)
    valid = torch.zeros(2, 20, dtype=torch.bool)
    for b, (height, width) in enumerate([SIZE, (2, 3)]):
        number = torch.arange(height * width)
        coordinates[b, : height * width] = torch.stack([number // width, number % width], -1)
        valid[b, : height * width] = True
    positions = Positions.of_coordinates(coordinates, valid)
    out = layer(x, attn_mask=valid[:, None, None, :], layout=positions)
    assert out.isfinite().all()
    for b, size in enumerate([SIZE, (2, 3)]):
        alone = layer(x[b : b + 1, : size[0] * size[1]], size)
        assert relative_error(out[b, : size[0] * size[1]], alone[0]) < (1e-6 if dtype == torch.float32 else 2e-3)


def test_a_block_takes_positions_and_compiles_whole():
    block = sd.SDTBlock(16, 2, pos_kernel_size=0, mlp_kernel_size=0, lpe_kernel_size=0, num_prefix_tokens=1)
    x = torch.randn(2, 8, 16)
    positions = Positions.of_subset(torch.tensor(SUBSETS), Grid(*SIZE, num_prefix_tokens=1))
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, layout=positions), block(x, layout=positions))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Positions(torch.zeros(2, 3), torch.zeros(2, 4)), r"h and w must both be \(B, L\)"),
        (lambda: Positions(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)), "has_position must be bool"),
        (lambda: Positions.of_coordinates(torch.zeros(2, 3)), r"coordinates must be \(B, K, 2\)"),
        (lambda: sd.SpatialDecayMask(16, 2)(torch.zeros(1, 2, 3, 16), placed()), "a map needs a whole grid"),
        (
            lambda: sd.SpatialDecayMask(16, 2)(torch.zeros(1, 6, 16), layout=placed()),
            "the L = 6 tokens of x",
        ),
        (
            lambda: sd.SpatialDecayMask(16, 2, decay="decomposed")(torch.zeros(2, 10, 16), layout=placed()),
            "whole grid",
        ),
        (lambda: sd.SpatialDecayMask(16, 2, decay="gaussian")(torch.zeros(2, 10, 16), layout=placed()), "whole grid"),
        (lambda: sd.SpatialDecayAttention(16, 2)(torch.zeros(2, 10, 16), layout=placed()), "lpe_kernel_size=0"),
        (
            lambda: sd.SpatialDecayAttention(16, 2, rope="flat")(torch.zeros(2, 10, 16), layout=placed()),
            "rope='flat'",
        ),
        *(
            (
                lambda size=size: Positions(torch.zeros(1, 3), torch.zeros(1, 3), grid_size=size),
                r"grid_size must be \(H, W\)",
            )
            for size in ((0, 3), (-3, -3), (3,), 5, "ab")
        ),
        (lambda: AxialDecay.constant(*torch.zeros(2, 2), placed()), "a decomposed decay needs a whole grid"),
        (
            lambda: decay_attention(
                *torch.randn(3, 3, 1, 10, 8), sd.decay.ManhattanDecay(torch.zeros(1, 1, 10), placed())
            ),
            "those of the B = 3 images of q, or of 1: got 2",
        ),
    ],
)
def test_what_cannot_be_is_said(build, message):
    with pytest.raises(ValueError, match=message):
        build()
