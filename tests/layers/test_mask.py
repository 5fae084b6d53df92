"""SpatialDecayMask: from features to the equations' masks, for every kind; symmetries of the grid; errors."""

import pytest
import torch
import torch.nn.functional as F

from spatial_decay import SpatialDecayMask
from spatial_decay.layers.kinds import KINDS
from spatial_decay.layout import Grid
from tests.cases import AXIAL, GATED, GATES_OF_KIND, GRIDS, case_id, reference_mask, reference_of_head

DIM, HEADS = 6, 2


def make(case, num_prefix=0):
    mask = SpatialDecayMask(DIM, HEADS, decay=case.config, num_prefix_tokens=num_prefix).double()
    for parameter in mask.parameters():
        torch.nn.init.normal_(parameter)
    return mask


def gates_of(mask, x):
    """The gates of the features, (B, N, L) each, by hand."""
    return [
        F.logsigmoid(x @ getattr(mask, name).weight.T).transpose(1, 2).detach()
        for name in GATES_OF_KIND[mask.kind.name]
    ]


@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize("size", GRIDS, ids=case_id)
@pytest.mark.parametrize("case", [case for case in GATED if not case.is_axial], ids=case_id)
def test_equals_the_equations(case, size, num_prefix):
    grid = Grid(*size, num_prefix)
    mask = make(case, num_prefix)
    x = torch.randn(1, grid.num_tokens, DIM, dtype=torch.float64)
    expected = reference_mask(case, gates_of(mask, x), HEADS, grid)
    out = mask(x, size)
    assert out.shape == (1, HEADS, grid.num_tokens, grid.num_tokens)
    torch.testing.assert_close(out, expected.expand_as(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", GRIDS, ids=case_id)
@pytest.mark.parametrize("case", AXIAL, ids=case_id)
def test_decomposed_equals_the_equations(case, size):
    height, width = size
    mask = make(case)
    x = torch.randn(2, height, width, DIM, dtype=torch.float64)
    columns, rows = mask(x)
    assert columns.shape == (2, width, HEADS, height, height)
    assert rows.shape == (2, height, HEADS, width, width)
    gates = gates_of(mask, x.flatten(1, 2))
    for b in range(2):
        for n in range(HEADS):
            expected_columns, expected_rows = reference_of_head(case, gates, b, n, HEADS, Grid(*size))
            for got, expected in ((columns[b, :, n], expected_columns), (rows[b, :, n], expected_rows)):
                torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in GATED if case.num_gates], ids=case_id)
def test_gradients_to_x_and_to_the_gates_weights(case):
    mask = make(case)
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in mask.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in mask.parameters()]

    def run(x, *weights):
        out = torch.func.functional_call(mask, dict(zip(names, weights, strict=True)), (x, (2, 3)))
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(o.exp() for o in outs)  # exp: -inf of causal becomes 0

    assert len(weights) == case.num_gates
    assert torch.autograd.gradcheck(run, (x, *weights))


@pytest.mark.parametrize("kind", ["full", "fixed", "squared"])
@pytest.mark.parametrize(
    "permute",
    [lambda x: x.transpose(1, 2), lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.flip(1).transpose(1, 2)],
    ids=["transpose", "flip_rows", "flip_columns", "rotate"],
)
def test_permuting_the_grid_permutes_the_mask(kind, permute):
    mask = SpatialDecayMask(DIM, HEADS, decay=kind).double()
    x = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    order = permute(torch.arange(15).reshape(1, 3, 5, 1)).flatten()
    torch.testing.assert_close(mask(permute(x)), mask(x)[:, :, order][:, :, :, order], rtol=0, atol=0)


def test_none_adds_nothing():
    mask = SpatialDecayMask(DIM, HEADS, decay="none")
    assert mask(torch.randn(1, 4, DIM)) is None
    assert mask.describe(torch.randn(1, 4, DIM)) is None
    assert not list(mask.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_mask_goes_into_sdpa(kind):
    """As the README has it, in the dtype of x."""
    mask = SpatialDecayMask(32, 4, decay=kind)
    x = torch.randn(2, 16, 32, dtype=torch.bfloat16)
    out = mask(x)
    if kind in ("decomposed", "fixed_decomposed"):
        assert all(o.dtype == torch.bfloat16 for o in out)
    else:
        q = torch.randn(2, 4, 16, 8, dtype=torch.bfloat16)
        assert F.scaled_dot_product_attention(q, q, q, attn_mask=out).isfinite().all()


@pytest.mark.parametrize("kind", ["1d", "bidirectional", "decomposed", "full"])
def test_sums_stay_in_float32_in_half_precision(kind):
    """1d on 56 x 56: in bf16 a cumulative sum would stop growing at 256 times the gate."""
    mask = SpatialDecayMask(8, 1, decay=kind)
    x = torch.randn(1, 56, 56, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decay = mask.describe(x)
    described = [decay.rows, decay.columns] if kind == "decomposed" else [decay]
    exact = mask.describe(x)
    expected = [exact.rows, exact.columns] if kind == "decomposed" else [exact]
    for got, want in zip(described, expected, strict=True):
        assert got.numbers[0].dtype == torch.float32
        assert torch.equal(got.numbers[0], want.numbers[0])


def test_fixed_rates_do_not_follow_the_model_into_half_precision():
    x = torch.randn(1, 4, 4, 8)
    exact = SpatialDecayMask(8, 4, decay="fixed").describe(x).strength
    assert torch.equal(SpatialDecayMask(8, 4, decay="fixed").bfloat16().describe(x.bfloat16()).strength, exact)


def test_another_size_is_just_another_call():
    mask = SpatialDecayMask(8, 2)
    assert mask(torch.randn(1, 9, 8)).shape[-1] == 9
    assert mask(torch.randn(1, 12, 8), (3, 4)).shape[-1] == 12
    assert mask(torch.randn(1, 9, 8)).shape[-1] == 9


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decay": "decomposed", "num_prefix_tokens": 1}, "'decomposed' needs num_prefix_tokens = 0.*tokens=1"),
        ({"decay": "fixed_decomposed", "num_prefix_tokens": 2}, "'fixed_decomposed' needs num_prefix_tokens = 0"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens must be >= 0: got -1"),
        ({"num_heads": 0}, "num_heads must be >= 1: got 0"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        SpatialDecayMask(8, **{"num_heads": 2, **options})


def test_a_host_may_ask_any_module_for_its_bias():
    """As transformers and others do where they initialise weights: `if m.bias is not None: nn.init.zeros_(m.bias)`."""
    for module in SpatialDecayMask(8, 2).modules():
        bias = getattr(module, "bias", None)
        assert bias is None or isinstance(bias, torch.nn.Parameter)
