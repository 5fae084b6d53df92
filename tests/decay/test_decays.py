"""Every kind's mask against the equations as loops, against hand-worked numbers, and against its own score function."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_decay.decay import (
    AxialDecay,
    FactoredDecay,
    ManhattanDecay,
    PathDecay,
    dense,
    factor,
    register_factor,
    score_mod,
)
from spatial_decay.layout import Grid, Layout, Positions
from spatial_decay.ops import decay_attention
from tests.cases import (
    AXIAL,
    GRIDS,
    PAIRWISE,
    TRAINED,
    case_id,
    make_gates,
    reference_mask,
    reference_of_head,
    relative_error,
)


@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("size", GRIDS, ids=case_id)
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_dense_is_the_equation(case, size, num_prefix):
    grid = Grid(*size, num_prefix)
    batch_size = 1 if size == (14, 14) else 2
    gates = make_gates(case, batch_size, 2, grid.num_tokens)
    mask = dense(case.build(gates, 2, grid))
    expected = reference_mask(case, gates, 2, grid)
    assert mask.shape == expected.shape
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-12 * max(1.0, _largest(expected)))


@pytest.mark.parametrize("size", GRIDS, ids=case_id)
@pytest.mark.parametrize("case", AXIAL, ids=case_id)
def test_axial_masks_are_the_equation(case, size):
    grid = Grid(*size)
    height, width = size
    gates = make_gates(case, 1, 2, grid.num_tokens)
    decay = case.build(gates, 2, grid)
    columns = dense(decay.columns).expand(width, -1, -1, -1)  # (W, N, H, H), one image
    rows = dense(decay.rows).expand(height, -1, -1, -1)
    for n in range(2):
        expected_columns, expected_rows = reference_of_head(case, gates, 0, n, 2, grid)
        for got, expected in ((columns, expected_columns), (rows, expected_rows)):
            expected = torch.tensor(expected, dtype=torch.float64)
            torch.testing.assert_close(got[:, n], expected, rtol=0, atol=1e-12)


def _largest(mask):
    return mask[mask.isfinite()].abs().max().item()


def test_full_by_hand_on_2x2():
    # Tokens 0 1 / 2 3; distances 1 along an edge, 2 along a diagonal; a = alpha * G / 2 with alpha = 0.1.
    gate = torch.tensor([[[-1.0, -2.0, -3.0, -4.0]]], dtype=torch.float64)
    expected = torch.tensor(
        [
            [0.0, -0.15, -0.20, -0.50],
            [-0.15, 0.0, -0.50, -0.30],
            [-0.20, -0.50, 0.0, -0.35],
            [-0.50, -0.30, -0.35, 0.0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(dense(ManhattanDecay.from_gate(gate, Grid(2, 2)))[0, 0], expected)


def test_paths_by_hand_on_1x3():
    grid, inf = Grid(1, 3), float("inf")
    forward = torch.tensor([[[-1.0, -2.0, -4.0]]], dtype=torch.float64)
    backward = torch.tensor([[[-8.0, -16.0, -32.0]]], dtype=torch.float64)
    one = torch.tensor([[0.0, -1.0, -3.0], [-1.0, 0.0, -2.0], [-3.0, -2.0, 0.0]], dtype=torch.float64)
    causal = torch.tensor([[0.0, -inf, -inf], [-1.0, 0.0, -inf], [-3.0, -2.0, 0.0]], dtype=torch.float64)
    # backward: 0-1 costs 16, 1-2 costs 32; the mean with 1 and 2 is 8.5 and 17.
    both = torch.tensor([[0.0, -8.5, -25.5], [-8.5, 0.0, -17.0], [-25.5, -17.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(dense(PathDecay.from_gate(forward, grid))[0, 0], one)
    torch.testing.assert_close(dense(PathDecay.from_gate(forward, grid, causal=True))[0, 0], causal)
    torch.testing.assert_close(dense(PathDecay.bidirectional(forward, backward, grid))[0, 0], both)


def test_decomposed_by_hand_on_2x2():
    gate_h = torch.tensor([[[-1.0, -2.0, -4.0, -8.0]]], dtype=torch.float64)
    gate_w = torch.tensor([[[-16.0, -32.0, -64.0, -128.0]]], dtype=torch.float64)
    decay = AxialDecay.from_gates(gate_h, gate_w, Grid(2, 2))
    # Down column w from row 0 to row 1 costs gate_h at (0, w); along row h from column 0 to 1 costs gate_w at (h, 0).
    assert dense(decay.columns)[:, 0, 0, 1].tolist() == [-1.0, -2.0]
    assert dense(decay.rows)[:, 0, 0, 1].tolist() == [-16.0, -64.0]


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_score_mod_is_dense(case, num_prefix):
    grid = Grid(3, 4, num_prefix)
    decay = case.build(make_gates(case, 2, 3, grid.num_tokens), 3, grid)
    index = [torch.arange(n) for n in (2, 3, grid.num_tokens, grid.num_tokens)]
    batch, head, q_index, k_index = torch.meshgrid(*index, indexing="ij")
    scores = torch.randn(batch.shape, dtype=torch.float64)
    torch.testing.assert_close(score_mod(decay)(scores, batch, head, q_index, k_index), scores + dense(decay))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_score_mod_runs_in_flex_attention(case):
    grid = Grid(3, 5, 2)
    decay = case.build(make_gates(case, 2, 3, grid.num_tokens, torch.float32), 3, grid)
    q, k, v = torch.randn(3, 2, 3, grid.num_tokens, 16)
    out = flex_attention(q, k, v, score_mod=score_mod(decay))
    torch.testing.assert_close(out, decay_attention(q, k, v, decay, backend="math"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("case", [case for case in PAIRWISE if case.num_gates], ids=case_id)
def test_gradients_to_the_gates(case, num_prefix):
    grid = Grid(2, 3, num_prefix)
    gates = [gate.requires_grad_() for gate in make_gates(case, 1, 2, grid.num_tokens)]

    def mask(*gates):
        return dense(case.build(gates, 2, grid)).exp()  # exp: -inf of causal becomes 0

    assert torch.autograd.gradcheck(mask, gates)


class _Allocations(TorchDispatchMode):
    """Counts results of operators that are as large as a mask and no view."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.numel() >= self.size
            and not func.is_view
            and "_" not in func._opname[-1:]
        ):
            self.count += 1
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("size", [(14, 14), (7, 9), (1, 28)], ids=case_id)
@pytest.mark.parametrize("case", PAIRWISE, ids=case_id)
def test_rows_of_the_mask_can_be_aligned_without_a_copy(case, size, num_prefix, dtype):
    grid = Grid(*size, num_prefix)
    decay = case.build(make_gates(case, 2, 3, grid.num_tokens, torch.float32), 3, grid)
    counts, masks = [], []
    for multiple in (1, 8):
        with _Allocations((6 if case.num_gates else 3) * grid.num_patches**2) as allocations:
            masks.append(dense(decay, dtype=dtype, row_multiple=multiple))
        counts.append(allocations.count)
    assert counts[1] == counts[0] > 0
    assert masks[1].untyped_storage().nbytes() <= 1.3 * masks[0].untyped_storage().nbytes()
    assert masks[1].stride(-1) == 1
    assert all(stride % 8 == 0 for stride in masks[1].stride()[:-1])
    assert torch.equal(*masks)


def test_half_precision_tensors_of_ones_own_lose_nothing_but_their_own_digits():
    """bf16 holds neither positions above 256 nor sums of hundreds of numbers."""
    tokens = -torch.rand(1, 1, 600).bfloat16()
    for build in (lambda t: ManhattanDecay(t, Grid(1, 600)), lambda t: PathDecay(t, Grid(1, 600), causal=True)):
        assert torch.equal(dense(build(tokens)), dense(build(tokens.float())))
        index = torch.tensor(0), torch.tensor(0), torch.tensor(256), torch.tensor(257)
        score = torch.zeros(())
        assert torch.equal(score_mod(build(tokens))(score, *index), dense(build(tokens))[0, 0, 256, 257])


@pytest.mark.parametrize("size", [(0, 3), (3, -1), (3, 3, -1)])
def test_impossible_grids_are_refused(size):
    with pytest.raises(ValueError, match="height >= 1, width >= 1 and num_prefix_tokens >= 0: got"):
        Grid(*size)


@pytest.mark.parametrize("case", [case for case in PAIRWISE if case.kind != "gaussian"], ids=case_id)  # sums nothing
def test_gates_in_half_precision_are_summed_in_float32(case):
    grid = Grid(4, 4)
    decay = case.build(make_gates(case, 1, 2, 16, torch.bfloat16), 2, grid)
    assert all(token.dtype in (torch.float32, torch.float64) for token in decay.numbers)
    assert dense(decay, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_axial_decay_refuses_prefix_tokens():
    gate = -torch.rand(1, 2, 13)
    with pytest.raises(ValueError, match="without prefix tokens.*num_prefix_tokens = 1"):
        AxialDecay.from_gates(gate, gate, Grid(3, 4, 1))


def test_a_gate_of_exactly_0_has_a_gradient():
    """As "no decay" rounds to: abs would give it 0, and it could never learn one."""
    gate = torch.zeros(1, 1, 6, dtype=torch.float64, requires_grad=True)
    dense(PathDecay.from_gate(gate, Grid(2, 3))).sum().backward()
    # Step k is on the path of 2 * (k + 1) * (5 - k) ordered pairs; the last gate is on none.
    assert gate.grad.flatten().tolist() == [2.0 * (k + 1) * (5 - k) for k in range(6)]


@pytest.mark.parametrize("causal", [False, True])
def test_tokens_at_one_place_add_nothing_to_each_other(causal):
    h, w = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    cumulative = torch.tensor([[[0.0, 1.0, 3.0, 7.0]]], requires_grad=True)
    mask = dense(PathDecay(cumulative, Positions(h, w), causal))[0, 0]
    later = -torch.inf if causal else None
    expected = [
        [0, later or -1, later or -3, later or -7],
        [-1, 0, 0, later or -6],
        [-3, 0, 0, later or -4],
        [-7, -6, -4, 0],
    ]
    assert mask.tolist() == expected
    mask[1:3, 1:3].sum().backward()
    assert not cumulative.grad.any()


@pytest.mark.parametrize("size", [(5, 9), (2, 13), (3, 3)], ids=case_id)
def test_odd_rows_are_aligned_in_little_memory(size):
    decay = ManhattanDecay(-torch.rand(1, 1, size[0] * size[1]), Grid(*size))
    aligned = dense(decay, row_multiple=8)
    assert aligned.stride(-2) == -(-size[0] * size[1] // 8) * 8
    assert torch.equal(aligned, dense(decay))


@register_factor
def rows_apart(*steps):
    """Of one axis alone."""
    return steps[0].abs()


@dataclass(frozen=True)
class RowsDecay(FactoredDecay):
    strength: torch.Tensor
    layout: Layout

    sign: ClassVar[int] = 1
    factor: ClassVar[str] = "rows_apart"


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("size", [(3, 4), (19, 20), (38, 37)], ids=case_id)
def test_a_formula_may_leave_out_an_axis(size, num_prefix):
    grid = Grid(*size, num_prefix)
    strength = -torch.rand(1, 1, grid.num_tokens)
    decay = RowsDecay(strength, grid)
    q, k, v = torch.randn(3, 1, 1, grid.num_tokens, 8)
    h = torch.nn.functional.pad(torch.arange(size[0]).repeat_interleave(size[1]), (num_prefix, 0))
    expected = (strength[..., :, None] + strength[..., None, :]) * (h[:, None] - h).abs()
    expected[..., :num_prefix] = expected[..., :num_prefix, :] = 0
    torch.testing.assert_close(dense(decay), expected)
    out = decay_attention(q, k, v, decay, backend="math")
    torch.testing.assert_close(decay_attention(q, k, v, decay, backend="tiled"), out, rtol=1e-5, atol=1e-5)


class Doubled(ManhattanDecay):
    def pairwise(self, query, key, *steps):
        return 2 * super().pairwise(query, key, *steps)


def test_what_a_subclass_says_is_heard():
    """By the backends that run pair formulas; those that run forms refuse it."""
    grid, strength = Grid(14, 14), -torch.rand(1, 4, 196)
    q, k, v = torch.randn(3, 1, 4, 196, 32)
    expected = decay_attention(q, k, v, ManhattanDecay(2 * strength, grid), backend="math")
    torch.testing.assert_close(decay_attention(q, k, v, Doubled(strength, grid)), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Doubled .needs a FactoredDecay"):
        decay_attention(q, k, v, Doubled(strength, grid), backend="tiled")
    with pytest.raises(NotImplementedError, match="Doubled .needs None or a ManhattanDecay"):
        decay_attention(q, k, v, Doubled(strength, grid), backend="triton")


def test_a_sign_is_one_of_two():
    with pytest.raises(ValueError, match="sign of Twice must be 1 or -1: got 2"):
        type("Twice", (RowsDecay,), {"sign": 2})


def test_a_factor_has_a_name_of_its_own():
    def order(*steps):
        return steps[0]

    with pytest.raises(ValueError, match="name of its own: got order, which spatial_decay.decay.path has registered"):
        register_factor(order)
    with pytest.raises(ValueError, match="registered function, one of manhattan_distance, order.*: got 'nowhere'"):
        factor("nowhere", torch.zeros(1))


def test_three_axes_are_one_more_step():
    """Video: the formulas take any number of axes."""
    dt, dh, dw = torch.tensor([0.0, 0.0, -1.0]), torch.tensor([0.0, -2.0, 5.0]), torch.tensor([3.0, 1.0, 1.0])
    assert factor("order", dt, dh, dw).tolist() == [1.0, -1.0, -1.0]
    assert factor("manhattan_distance", dt, dh, dw).tolist() == [3.0, 3.0, 7.0]
    assert factor("euclidean_distance", dt, dh, dw).tolist() == pytest.approx([3.0, 5.0**0.5, 27.0**0.5])


@pytest.mark.parametrize("strong", [-1e3, -1e8, -3e38, float("-inf")])
@pytest.mark.parametrize("case", [case for case in TRAINED if case.kind != "gaussian"], ids=case_id)
def test_one_very_strong_gate_does_not_spoil_the_others(case, strong):
    """Sums along a path lost the digits of all that came behind it; a Manhattan strength of -3e38 was no number."""
    grid = Grid(4, 5)
    q, k, v = torch.randn(3, 1, 2, 20, 8, dtype=torch.float64)
    gates = [0.01 * gate for gate in make_gates(case, 1, 2, 20)]
    gates[0][..., 3] = strong
    found = {}
    for dtype, strongest in ((torch.float64, -1e4), (torch.float32, strong)):  # float64 has the digits for -1e4
        leaves = [gate.clamp(min=strongest).to(dtype).requires_grad_() for gate in gates]
        out = decay_attention(*(x.to(dtype) for x in (q, k, v)), case.build(leaves, 2, grid))
        found[dtype] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for wanted, got in zip(found[torch.float64], found[torch.float32], strict=True):
        assert relative_error(got, wanted) < 4e-5  # sums of 256 and more end at 3e-5


def test_what_many_strong_gates_still_lose():
    """As docs/concepts/precision.md says, n gates at the bound leave differences uncertain by n * 3e-5 nats."""
    grid, num_strong = Grid(1, 1024), 520  # a sum just above a power of two, where float32 has the coarsest steps
    gate = -torch.rand(1, 1, 1024)
    gate[..., :num_strong] = -1e8
    found, wanted = (dense(PathDecay.from_gate(g, grid)) for g in (gate, gate.double()))
    error = (found - wanted).abs()[wanted > -20].max()
    assert 2.5e-5 < error / num_strong < 3.1e-5


def test_gates_that_make_no_decay_are_refused():
    grid, gate = Grid(2, 2, 1), -torch.rand(1, 2, 5)
    wrong = gate.clone()
    wrong[0, 1, 3] = 0.25
    says = "must lie in -inf .. 0: got .* 0.25. Take it from a gate, which is the logarithm of a number"
    for build in (
        lambda g: ManhattanDecay.from_gate(g, grid),
        lambda g: PathDecay.from_gate(g, grid),
        lambda g: PathDecay.bidirectional(gate, g, grid),
        lambda g: PathDecay.bidirectional(g, gate, grid),
    ):
        build(gate)
        with pytest.raises(ValueError, match=f"gate {says}"):
            build(wrong)
    ManhattanDecay.from_gate(wrong.to("meta"), grid)  # nothing to look at
    with pytest.raises(ValueError, match="strength must lie in -1.3e.30 .. 0: got .*0.25"):
        ManhattanDecay(wrong, grid)
    with pytest.raises(ValueError, match="strength must lie in -1.3e.30 .. 0: got -3e.38"):
        ManhattanDecay(torch.full((1, 1, 5), -3e38), grid)
    for alpha in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be finite and > 0"):
            ManhattanDecay.from_gate(gate, grid, alpha=alpha)
    nowhere = Positions(torch.zeros(1, 5), torch.zeros(1, 5), torch.tensor([[True, True, True, False, True]]))
    of_nowhere = wrong.clone()
    wrong[0, 1, 3], wrong[0, 1, 0] = -1.0, 0.5  # of a prefix token, whose number is not used
    assert dense(ManhattanDecay(wrong, grid)).max() == 0
    assert dense(ManhattanDecay(of_nowhere, nowhere)).max() == 0


def test_gates_of_another_number_of_images_are_told_where_q_is_known():
    layout = Positions(*torch.zeros(2, 3, 4), torch.ones(3, 4, dtype=torch.bool))
    decay = ManhattanDecay.from_gate(-torch.rand(2, 1, 4), layout)
    with pytest.raises(ValueError, match="decay must have"):
        decay_attention(*torch.randn(3, 3, 1, 4, 8), decay)


def test_steps_of_a_fraction_cost_what_full_says():
    """A bound of 256 nats a step would show where tokens lie a fraction of it apart."""
    gate = torch.tensor([[[-20.0, -20.0, -1e3]]])
    layout = Positions(torch.zeros(1, 3), torch.tensor([[0.0, 0.01, 0.03]]))
    mask = dense(ManhattanDecay.from_gate(gate, layout, alpha=100.0))[0, 0]
    assert mask[0].tolist() == pytest.approx([0.0, -0.01 * 20 * 100, -0.03 * 510 * 100])
