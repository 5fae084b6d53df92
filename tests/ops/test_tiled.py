"""Backend `tiled`: blocks of every size against `math`, its operators, its memory, and what it cannot run.

That it equals the equations, with masks, gradients and precision, is checked with all backends in test_attention.py.
"""

import os
import subprocess
import sys

import pytest
import torch

from spatial_decay.decay import PathDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention, tiled
from tests.cases import CASES, PAIRWISE, TOLERANCE, case_id, make_gates, relative_error


def both(case, grid, *, num_heads=2, batch_size=1, head_dim=8, attn_mask=None, dtype=torch.float32):
    """Output and gradients of tiled and of math."""
    leaves = [torch.randn(batch_size, num_heads, grid.num_tokens, head_dim, dtype=dtype) for _ in range(3)]
    leaves += make_gates(case, batch_size, num_heads, grid.num_tokens, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight = torch.randn(batch_size, num_heads, grid.num_tokens, head_dim, dtype=dtype)
    results = []
    for backend in ("tiled", "math"):
        decay = case.build(leaves[3:], num_heads, grid)
        out = decay_attention(*leaves[:3], decay, attn_mask=attn_mask, backend=backend)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    return zip(*results, strict=True)


# 17 x 19: just over the length at which whole rows of several heads make a block; 24 x 25: several blocks of queries
# backward; 37 x 38: several blocks of keys forward, the last one smaller.
@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("size", [(17, 19), (24, 25), (37, 38)], ids=case_id)
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_long_sequences_equal_math(case, size, num_prefix):
    for got, expected in both(case, Grid(*size, num_prefix)):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1), (2, 3, 1, 1)])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_masks_of_every_shape_in_several_blocks(monkeypatch, case, shape):
    """Blocks so small that heads and queries are split; the mask tells images, heads and queries apart."""
    monkeypatch.setattr(tiled, "_BLOCK", 1)
    monkeypatch.setattr(tiled._Blocks, "row_blocks", lambda self: tiled._slices(0, self.length, 5))
    grid = Grid(3, 4, 0 if case.is_axial else 2)
    length = grid.num_tokens
    attn_mask = torch.randn(*shape[:2], length if shape[0] == 2 else 1, length)
    attn_mask[..., -2:] = float("-inf")
    for got, expected in both(case, grid, batch_size=2, num_heads=3, attn_mask=attn_mask):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients_in_bf16(case):
    for got, expected in both(case, Grid(5, 6), dtype=torch.bfloat16):
        assert relative_error(got, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("size", [(5, 6), (24, 25)], ids=case_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_results_are_bitwise_repeatable(case, size):
    torch.manual_seed(0)
    first = [got for got, _ in both(case, Grid(*size))]
    torch.manual_seed(0)
    again = [got for got, _ in both(case, Grid(*size))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("form", [("manhattan_distance", 1, False), ("order", -1, False), ("order", -1, True)])
def test_the_operator_is_well_made(form):
    q, k, v = (torch.randn(2, 2, 13, 4, requires_grad=True) for _ in range(3))
    numbers = torch.rand(2, 2, 13).cumsum(-1).requires_grad_()
    for attn_mask in (None, torch.randn(2, 1, 1, 13)):
        torch.library.opcheck(tiled._forward, (q, k, v, numbers, attn_mask, 0.5, [3, 4, 1], *form))


def test_it_is_one_graph():
    q, k, v = torch.randn(3, 2, 2, 30, 8)
    gate = -torch.rand(2, 2, 30)

    def attend(q, k, v, gate):
        return decay_attention(q, k, v, PathDecay.from_gate(gate, Grid(5, 6)), backend="tiled")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, gate), attend(q, k, v, gate))


def test_auto_does_not_choose_it(monkeypatch):
    monkeypatch.setattr(tiled, "attention", lambda inputs: pytest.fail("auto chose tiled"))
    q = torch.randn(1, 2, 12, 8)
    decay_attention(q, q, q, PathDecay.from_gate(-torch.rand(1, 2, 12), Grid(3, 4)))


def test_it_says_all_that_it_cannot():
    q = torch.randn(1, 1, 4, 8)
    mask = torch.zeros(4, 4, requires_grad=True)
    with pytest.raises(NotImplementedError) as caught:
        decay_attention(q, q, q, attn_mask=mask, dropout_p=0.1, backend="tiled")
    assert str(caught.value) == (
        "backend='tiled' cannot run these inputs:\n"
        "  - no decay (needs a FactoredDecay, as ManhattanDecay and PathDecay are, or a GaussianDecay)\n"
        "  - dropout_p=0.1 (needs 0)\n"
        "  - attn_mask requires grad (needs one without)\n"
        "Use backend='auto' or one of: sdpa, math."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from Linux's /proc")
@pytest.mark.slow
def test_scratch_memory_is_bounded():
    """Peak memory of forward and backward beyond inputs, outputs and gradients; a mask is 1 GB."""
    side = 128
    code = f"""
import pathlib, torch
from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention

def run(side):
    q, k, v = (torch.randn(1, 1, side * side, 16, requires_grad=True) for _ in range(3))
    gate = (-torch.rand(1, 1, side * side)).requires_grad_()
    out = decay_attention(q, k, v, ManhattanDecay.from_gate(gate, Grid(side, side)), backend="tiled")
    out.backward(torch.ones_like(out))

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

for warm in (20, 40):
    run(warm)
before = resident("VmRSS")
run({side})
print(resident("VmHWM") - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    tensors = 9 * side**2 * 16 * 4 / 2**20  # q, k, v, out, their gradients and the output's
    assert float(done.stdout) - tensors < 64  # MiB
