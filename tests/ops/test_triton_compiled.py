"""Backend `triton` as compiled, where the interpreter cannot see it: products and sums become one instruction there."""

import pytest
import torch

from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops.attn_mask import limit_of
from tests.cases import AXIAL, case_id
from tests.ops.test_triton import FULL, TOLERANCE, check, error, make, run
from tests.ops.test_triton import pytestmark as needs_triton

pytestmark = [needs_triton, pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="runs there itself")]
COMPILED = pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.float32), (90, torch.bfloat16), (80, torch.float16)], ids=case_id
)


def check_masked(inputs, mask):
    """As check; what means "may not attend" is judged in the mask's own dtype, which the reference has not."""
    expected = run(
        *inputs, backend="math", attn_mask=mask.double().masked_fill(mask <= limit_of(mask.dtype), -torch.inf)
    )
    for got, wanted in zip(run(*inputs, attn_mask=mask), expected, strict=True):
        assert got.isfinite().all()
        assert error(got, wanted) < TOLERANCE[mask.dtype]


@COMPILED
@pytest.mark.parametrize(("grid", "num_first"), [(Grid(5, 8, 1), 33), (Grid(5, 8, 1), 1), (Grid(4, 5), 9)], ids=case_id)
def test_masks_of_large_finite_numbers(emulated, capability, dtype, grid, num_first):
    """Of all keys that a loop takes first, and of whole rows: below 0, and at 0 where the others are far above."""
    emulated(capability)
    inputs, lowest = make(FULL, grid, num_heads=1, dtype=dtype), torch.finfo(dtype).min
    is_first = torch.arange(grid.num_tokens) < num_first
    for value in {max(value, lowest) for value in (-1e4, -3e4, -9.9e4, -1e5, -1e10, lowest)}:
        for first, others in ((value, 0.0), (0.0, -value), (value, value)):
            check_masked(inputs, torch.where(is_first, first, others).to(dtype)[None, None, None])


@COMPILED
def test_decays_of_large_numbers(emulated, capability, dtype):
    """All keys that a loop takes first are far from some queries."""
    emulated(capability)
    q, k, v, grad, decay = make(FULL, Grid(7, 20), num_heads=1, dtype=dtype)
    for value in (-1e3, -1e6, -1e10, -1e30):
        inputs = q, k, v, grad, ManhattanDecay(torch.full_like(decay.strength, value), decay.layout)
        for got, wanted in zip(run(*inputs), run(*inputs, backend="math"), strict=True):
            # A query sees itself alone: what should cancel out leaves the rounding of two dot products.
            assert error(got, wanted) < max(TOLERANCE[dtype], 2e-5)


@pytest.mark.parametrize("value", [-1e2, -1e4, -1e6])
def test_rows_far_below_zero(emulated, value):
    """Every other column is hidden, so that half of the queries see nothing near: as exact as the scores are."""
    emulated(80)
    q, k, v, grad, decay = make(FULL, Grid(7, 10), num_heads=1)
    inputs = q, k, v, grad, ManhattanDecay(torch.full_like(decay.strength, value), decay.layout)
    mask = (torch.arange(70) % 2 == 0)[None, None, None]
    expected = run(*inputs, backend="math", attn_mask=mask)
    pairs = zip(run(*inputs, attn_mask=mask), run(*inputs, backend="tiled", attn_mask=mask), expected, strict=True)
    for got, tiled, wanted in pairs:
        assert error(got, wanted) < 1.5 * error(tiled, wanted) + 1e-6


def test_rows_that_lie_below_all_are_empty(emulated):
    """Scores of -1e8 have no digits left for their differences."""
    emulated(80)
    q, k, v, grad, decay = make(FULL, Grid(7, 10), num_heads=1)
    inputs = q, k, v, grad, ManhattanDecay(torch.full_like(decay.strength, -1e8), decay.layout)
    mask = (torch.arange(70) % 2 == 0)[None, None, None]
    out, dq, dk, dv, dstrength = run(*inputs, attn_mask=mask)
    assert (out[..., 1::2, :] == 0).all()
    assert (dq[..., 1::2, :] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv, dstrength))


@pytest.mark.parametrize(
    ("case", "grid", "head_dim"),
    [(AXIAL[1], Grid(3, 14), 32), (FULL, Grid(3, 14), 72)],
    ids=case_id,
)
def test_threads_agree_to_the_last_bit(emulated, case, grid, head_dim):
    """Where a thread has one product of a row, 16 tokens at a time: the emulator compares all stores to one place."""
    emulated(80)
    check(make(case, grid, head_dim=head_dim, num_heads=1))
