"""Rotary embedding against complex rotation, one pair at a time."""

import pytest
import torch

from spatial_decay.layers import RotaryEmbedding
from spatial_decay.layout import Grid, Positions
from tests import references


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize(("mode", "head_dim"), [("axial", 4), ("axial", 16), ("flat", 2), ("flat", 6)])
def test_equals_complex_rotation(mode, head_dim, num_prefix):
    grid = Grid(3, 5, num_prefix)
    q, k = torch.randn(2, 2, 3, grid.num_tokens, head_dim, dtype=torch.float64)
    for x, turned in zip((q, k), RotaryEmbedding(head_dim, mode)(q, k, grid), strict=True):
        expected = x.clone()
        for b in range(2):
            for n in range(3):
                for i in range(15):
                    result = references.rotate(x[b, n, num_prefix + i].tolist(), i // 5, i % 5, 5, mode)
                    expected[b, n, num_prefix + i] = torch.tensor(result, dtype=torch.float64)
        torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (4, 4), (1, 7)])
def test_in_steps_of_a_reference_grid(size):
    """Row h turns as row h * H0 / H of the grid trained on; there nothing changes."""
    grid, reference = Grid(*size, 1), (3, 5)
    q, k = torch.randn(2, 1, 2, grid.num_tokens, 8, dtype=torch.float64)
    turned, _ = RotaryEmbedding(8, "axial", reference)(q, k, grid)
    expected = q.clone()
    for n in range(2):
        for i in range(grid.num_patches):
            h, w = i // grid.width * 3 / grid.height, i % grid.width * 5 / grid.width
            rotated = references.rotate(q[0, n, 1 + i].tolist(), h, w, grid.width, "axial")
            expected[0, n, 1 + i] = torch.tensor(rotated, dtype=torch.float64)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(turned, RotaryEmbedding(8)(q, k, grid)[0]) == (size == reference)


def test_a_reference_grid_needs_a_whole_grid():
    positions, q = Positions(*torch.zeros(2, 1, 3)), torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"a reference grid of the rotary embedding needs a whole grid.*h \* H0 / H"):
        RotaryEmbedding(8, "axial", (3, 5))(q, q, positions)


def test_part_of_a_grid_turns_as_the_whole():
    grid, rope = Grid(6, 10), RotaryEmbedding(8, "axial", (3, 5))
    q, k = torch.randn(2, 1, 2, 60, 8)
    left = torch.tensor([40, 3, 17])
    for whole, part in zip(
        rope(q, k, grid), rope(q[:, :, left], k[:, :, left], grid.subset(left[None], 0)), strict=True
    ):
        torch.testing.assert_close(part, whole[:, :, left])


def test_sines_are_computed_once_for_both(monkeypatch):
    polar, calls = torch.polar, []
    monkeypatch.setattr(torch, "polar", lambda *args: calls.append(args) or polar(*args))
    RotaryEmbedding(8)(*torch.randn(2, 1, 2, 6, 8), Grid(2, 3))
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["axial", "flat"])
def test_scores_depend_on_the_offset_only(mode):
    rope = RotaryEmbedding(8, mode)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 30, 8)
    q, k = rope(q, k, Grid(5, 6))
    scores = (q @ k.transpose(-2, -1))[0, 0]
    torch.testing.assert_close(scores[0, 8], scores[7, 15])  # one down and two to the right, twice


def test_angles_stay_in_float32():
    q, k = torch.randn(2, 1, 1, 56 * 56, 8)
    exact, _ = RotaryEmbedding(8, "flat")(q, k, Grid(56, 56))
    half, _ = RotaryEmbedding(8, "flat")(q.bfloat16(), k.bfloat16(), Grid(56, 56))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)  # angles of 3,135 in bf16 would be off by 8


@pytest.mark.parametrize(
    ("head_dim", "mode", "says"),
    [
        (6, "axial", "rope='axial' needs head_dim to be a multiple of 4: got head_dim = 6"),
        (3, "flat", "rope='flat' needs head_dim to be a multiple of 2: got head_dim = 3"),
        (8, "2d", "rope must be one of axial, flat, none: got '2d'"),
    ],
)
def test_impossible_options_are_refused(head_dim, mode, says):
    with pytest.raises(ValueError, match=says):
        RotaryEmbedding(head_dim, mode)


@pytest.mark.parametrize(
    ("mode", "grid", "says"),
    [
        ("flat", (3, 5), r"needs rope='axial': got rope='flat' and \(3, 5\)"),
        ("none", (3, 5), r"needs rope='axial': got rope='none' and \(3, 5\)"),
        ("axial", 14, "rope_reference_grid must be .*, two whole numbers >= 1: got 14"),
        ("axial", (0, 5), r"two whole numbers >= 1: got \(0, 5\)"),
    ],
)
def test_impossible_reference_grids_are_refused(mode, grid, says):
    with pytest.raises(ValueError, match=says):
        RotaryEmbedding(8, mode, grid)
