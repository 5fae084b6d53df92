"""Rotary embedding against complex rotation, one pair at a time."""

import pytest
import torch

from spatial_decay.layers import RotaryEmbedding
from spatial_decay.layout import Grid
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
