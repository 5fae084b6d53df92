"""Kinds as values: names, mappings and values mean the same, options are checked and go through JSON."""

import inspect
import json
import typing
from decimal import Decimal

import numpy
import pytest
import torch

from spatial_decay import SDTBlock, SpatialDecayAttention, SpatialDecayMask, kinds
from spatial_decay.layers.kinds import KINDS, Kind, KindName, as_kind
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention
from tests import references
from tests.cases import CPU_BACKENDS, TOLERANCE, relative_error, widest_dtype

ALL = list(KINDS.values())
OPTIONS = {
    "alpha": 0.3,
    "gate_bias": True,
    "gate_bias_init": 1.5,
    "causal": True,
    "initial_value": 3.0,
    "heads_range": 2.0,
    "reference_grid": (3, 4),
}


def said(kind: type[Kind]) -> Kind:
    """The kind with every option said, none as it is by default."""
    return kind(**{option: OPTIONS[option] for option in kind.options()})


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_name_mapping_and_value_are_the_same(kind):
    assert as_kind(kind.name) == as_kind({"kind": kind.name}) == as_kind(kind()) == kind()
    value = said(kind)
    assert as_kind(json.loads(json.dumps(value.config))) == value
    masks = [SpatialDecayMask(12, 3, decay=decay) for decay in (value, value.config)]
    assert masks[0].kind == masks[1].kind == value
    assert masks[0].state_dict().keys() == masks[1].state_dict().keys()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_what_is_left_out_takes_the_value_of_the_place(kind):
    value = said(kind)
    assert value.resolved(**OPTIONS | dict.fromkeys(OPTIONS)) == value  # said is said
    left_open = [option for option, given in kind().resolved().config.items() if given is None]
    assert left_open == ["reference_grid"] * ("reference_grid" in kind.options() and kind is not kinds.Gaussian)
    quiet = kind().resolved(**kind.quiet).config
    assert quiet == kind().resolved().config | dict(kind.quiet)
    assert kind().resolved().resolved(**kind.quiet) == kind().resolved()
    assert kind().resolved(**dict.fromkeys(kind.options())) == kind().resolved()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_a_config_is_plain(kind, tmp_path):
    config = kind().resolved().config
    torch.save({"config": config}, tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", weights_only=True)["config"] == config == json.loads(json.dumps(config))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_kinds_are_frozen_and_documented(kind):
    with pytest.raises(AttributeError):
        kind().name = "other"
    assert all(f"{option}:" in inspect.getdoc(kind) for option in kind.options())


def test_numbers_of_other_libraries_become_plain():
    alpha = kinds.Full(alpha=numpy.float64(0.25)).alpha
    assert type(alpha) is float
    assert type(kinds.Full(alpha=1).alpha) is float


def test_the_literal_lists_all_kinds():
    assert typing.get_args(KindName) == tuple(KINDS)


def test_the_names_of_gates_are_those_of_saved_weights():
    assert kinds.Full.gates == kinds.OneDimensional.gates == ("gate",)
    assert kinds.Bidirectional.gates == ("gate_forward", "gate_backward")
    assert kinds.Decomposed.gates == ("gate_h", "gate_w")


def test_a_bias_is_there_where_its_first_value_is_said():
    assert kinds.Full(gate_bias_init=6.0).resolved().gate_bias is True
    assert kinds.Full(gate_bias=False).resolved(**kinds.Full.quiet).gate_bias_init == 0.0
    gate = SpatialDecayMask(8, 2, decay=kinds.Full(gate_bias_init=6.0)).gate
    assert torch.equal(gate.bias.detach(), torch.full((2,), 6.0))


def test_learned_rates_begin_as_the_fixed_ones():
    fixed, learned = (SpatialDecayMask(12, 3, decay=decay) for decay in ("fixed", "learned"))
    x = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(learned(x), fixed(x).expand(2, -1, -1, -1), rtol=1e-6, atol=1e-6)
    options = {"initial_value": 1.0, "heads_range": 3.0}
    fixed, learned = (SpatialDecayMask(12, 3, decay={"kind": kind, **options}) for kind in ("fixed", "learned"))
    torch.testing.assert_close(learned(x), fixed(x).expand(2, -1, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("initial_value", [1e-9, 1e-3, 30.0, 200.0, 2000.0])
def test_learned_rates_begin_as_numbers(initial_value):
    kind = kinds.Learned(initial_value=initial_value, heads_range=0.0)
    found = SpatialDecayMask(12, 3, decay=kind).rates.weight.detach()
    u = Decimal(2) ** Decimal(-initial_value)
    torch.testing.assert_close(found, torch.full((3,), float((u / (1 - u)).ln())))
    with torch.device("meta"):
        mask = SpatialDecayMask(12, 3, decay=kind)
    mask.to_empty(device="cpu").rates.reset_parameters()
    assert torch.equal(mask.rates.weight, found)


@pytest.mark.parametrize("initial_value", [1e-9, 1e-6, 1e-3, 0.999, 1.0, 2.0, 24.0])
def test_fixed_rates_are_those_of_the_formula(initial_value):
    """Where u is near 1 as where it is near 0: rates as exact as float32."""
    mask = SpatialDecayMask(12, 3, decay=kinds.Fixed(initial_value=initial_value, heads_range=0.0))
    found = mask.describe(torch.zeros(1, 4, 12), (2, 2)).strength * 2  # of query and key together
    expected = float((1 - Decimal(2) ** Decimal(-initial_value)).ln())
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0)


def test_in_a_trained_model_learned_rates_begin_quietly():
    mask = SpatialDecayMask(12, 3, decay=kinds.Learned().resolved(**kinds.Learned.quiet))
    torch.testing.assert_close(mask.rates().detach(), torch.full((3,), 2.0**-12), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_learned_rates_against_loops_in_every_backend(backend, num_prefix):
    """Values and gradients; what is not trained, d_M, comes from the loops of a rate of 1."""
    dtype, grid = widest_dtype(backend), Grid(5, 6, num_prefix)
    mask = SpatialDecayMask(12, 3, decay="learned", num_prefix_tokens=num_prefix).to(dtype)
    torch.nn.init.normal_(mask.rates.weight)
    q, k, v, weight = torch.randn(4, 2, 3, grid.num_tokens, 4, dtype=dtype)
    q.requires_grad_()
    decay = mask.describe(torch.randn(2, grid.num_tokens, 12, dtype=dtype), grid)
    out = decay_attention(q, k, v, decay, backend=backend)
    found = [out, *torch.autograd.grad((out * weight).sum(), [q, mask.rates.weight])]

    rates = torch.nn.functional.softplus(mask.rates.weight.double())
    distances = torch.tensor(references.with_prefix(references.fixed(1.0, 5, 6), num_prefix), dtype=torch.float64)
    exact = q.detach().double().requires_grad_()
    scores = exact @ k.double().mT / 2 + rates[:, None, None] * distances
    out = scores.softmax(-1) @ v.double()
    expected = [out, *torch.autograd.grad((out * weight).sum(), [exact, mask.rates.weight])]
    for got, right in zip(found, expected, strict=True):
        assert relative_error(got, right) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("decay", "error", "says"),
    [
        ({"kind": "1d", "alpha": 7}, ValueError, "'1d' has the options gate_bias, gate_bias_init, causal: got alpha"),
        ({"kind": "none", "alpha": 7}, ValueError, "'none' has no options: got alpha"),
        ({"kind": "full", 3: 7}, ValueError, "got 3"),
        ({"alpha": 0.2}, ValueError, 'must say its "kind", one of full, .*: got {.alpha.: 0.2}'),
        ({"kind": None}, ValueError, "kind of decay must be one of full, .*: got None"),
        (
            "gauss",
            ValueError,
            "one of full, fixed, learned, alibi, squared, 1d, bidirectional, .*, fixed_decomposed, gaussian, none: got",
        ),
        (None, TypeError, "decay must be the name of a kind, a value .* or a mapping .*: got NoneType"),
        (["full"], TypeError, "got list"),
        (kinds.Full, TypeError, "a value such as kinds.Full"),
        ({"kind": "full", "alpha": 0.0}, ValueError, "alpha must be finite and > 0: got 0.0"),
        ({"kind": "full", "alpha": -1.0}, ValueError, "alpha must be finite and > 0: got -1.0"),
        ({"kind": "full", "alpha": float("nan")}, ValueError, "alpha of kind 'full' must be a finite number: got nan"),
        ({"kind": "full", "alpha": float("inf")}, ValueError, "alpha of kind 'full' must be a finite number: got inf"),
        ({"kind": "full", "alpha": "0.1"}, ValueError, "alpha of kind 'full' must be a finite number: got '0.1'"),
        ({"kind": "full", "alpha": True}, ValueError, "must be a finite number: got True"),
        ({"kind": "full", "gate_bias": 1}, ValueError, "gate_bias of kind 'full' must be True or False: got 1"),
        ({"kind": "1d", "causal": "yes"}, ValueError, "causal of kind '1d' must be True or False: got 'yes'"),
        ({"kind": "full", "gate_bias": False, "gate_bias_init": 2.0}, ValueError, "gate_bias_init needs a gate_bias"),
        ({"kind": "fixed", "initial_value": 0.0}, ValueError, r"heads_range \* n / N > 0 .*: got initial_value=0.0"),
        (
            {"kind": "fixed", "initial_value": 0.2, "heads_range": -0.39999998},
            ValueError,
            "above what float32 rounds to 0",
        ),
        ({"kind": "fixed", "heads_range": -9.0}, ValueError, "got initial_value=2.0, heads_range=-9.0, N = 2"),
        (
            {"kind": "gaussian", "reference_grid": (0, 4)},
            ValueError,
            r"two whole numbers >= 1: got \(0, 4\)",
        ),
        ({"kind": "gaussian", "reference_grid": (4,)}, ValueError, r"two whole numbers >= 1: got \(4,\)"),
        ({"kind": "gaussian", "reference_grid": (True, 4)}, ValueError, r"two whole numbers >= 1: got \(True, 4\)"),
        ({"kind": "gaussian", "reference_grid": 14}, ValueError, "two whole numbers >= 1: got 14"),
    ],
)
def test_impossible_decays_are_refused(decay, error, says):
    for build in (SpatialDecayMask, SpatialDecayAttention, SDTBlock):
        with pytest.raises(error, match=says):
            build(16, 2, decay=decay)
