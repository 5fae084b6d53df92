"""Distances in steps of the grid trained on, against loops; and what the other kinds and layouts say of it."""

import json

import pytest
import timm
import torch
from torch import Tensor

import spatial_decay as sd
from spatial_decay import SpatialDecayMask, kinds
from spatial_decay.layers.core import DecayAttention
from spatial_decay.layers.kinds import KINDS, as_kind
from spatial_decay.layout import Grid, Positions
from tests import references
from tests.cases import case_id

WITH_IT = [name for name, kind in KINDS.items() if "reference_grid" in kind.options() and name != "gaussian"]
HEADS, DIM = 3, 12
REFERENCE = (3, 4)
GRIDS = [(3, 4), (6, 8), (2, 7), (1, 5)]


def make(kind, reference_grid=REFERENCE, **options):
    return SpatialDecayMask(DIM, HEADS, decay={"kind": kind, "reference_grid": reference_grid}, **options).double()


def of_loops(mask, x, size):
    """What the equations say of distances in steps of REFERENCE: (N, L, L), or of columns and rows."""
    (height, width), name = size, mask.kind.name
    steps_h, steps_w = REFERENCE[0] / height, REFERENCE[1] / width
    step = sum(REFERENCE) / (height + width)
    gates = [
        [
            [references.gate([token], weight)[0] for token in x.tolist()]
            for weight in getattr(mask, gate).weight.tolist()
        ]
        for gate in getattr(mask.kind, "gates", ())
    ]
    found = []
    for n in range(HEADS):
        rate = references.fixed_rate(n, HEADS, 2.0, 4.0)
        if name == "full":
            found.append(references.full([g * step for g in gates[0][n]], height, width))
        elif name == "squared":
            found.append(references.squared([g * step**2 for g in gates[0][n]], height, width))
        elif name in ("fixed", "learned"):
            found.append(references.fixed(rate * step, height, width))
        elif name == "alibi":
            found.append(references.alibi(references.alibi_slopes(HEADS)[n] * step, height, width))
        elif name == "decomposed":
            gate_h, gate_w = (
                [g * steps for g in gate[n]] for gate, steps in zip(gates, (steps_h, steps_w), strict=True)
            )
            found.append(references.decomposed(gate_h, gate_w, height, width))
        else:
            columns, _ = references.fixed_decomposed(rate * steps_h, height, width)
            _, rows = references.fixed_decomposed(rate * steps_w, height, width)
            found.append((columns, rows))
    if isinstance(found[0], tuple):
        return tuple(torch.tensor(side, dtype=torch.float64).transpose(0, 1) for side in zip(*found, strict=True))
    return torch.tensor(found, dtype=torch.float64)


def as_pair(mask):
    return (mask,) if isinstance(mask, Tensor) else mask


@pytest.mark.parametrize("size", GRIDS, ids=case_id)
@pytest.mark.parametrize("kind", WITH_IT)
def test_equals_the_equations(kind, size):
    mask, x = make(kind), torch.randn(1, *size, DIM, dtype=torch.float64)
    # Trained rates begin in float32.
    tolerance = 1e-6 if kind == "learned" else 1e-12
    expected = as_pair(of_loops(mask, x[0].flatten(0, 1), size))
    for got, right in zip(as_pair(mask(x)), expected, strict=True):
        torch.testing.assert_close(got[0].detach(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", WITH_IT)
def test_on_the_grid_trained_on_it_changes_nothing(kind):
    mask, x = make(kind), torch.randn(2, *REFERENCE, DIM, dtype=torch.float64)
    off = make(kind, None)
    off.load_state_dict(mask.state_dict())
    for got, right in zip(as_pair(mask(x)), as_pair(off(x)), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("kind", WITH_IT)
def test_opposite_borders_stay_as_far(kind):
    """Of a row of 1 + 100 * n tokens the first and the last, whatever n is."""
    masks = []
    for count in (101, 201, 1001):
        x = torch.ones(1, 1, count, DIM, dtype=torch.float64)
        torch.manual_seed(0)
        mask = make(kind, (1, 101))(x)
        masks.append((mask if isinstance(mask, Tensor) else mask[1]).flatten(0, -3)[:HEADS, 0, -1].detach())
    for larger in masks[1:]:  # n * 100 of 1 + n * 100 steps, or their square
        torch.testing.assert_close(larger, masks[0], rtol=0.04 if kind == "squared" else 0.02, atol=0)


def test_the_gates_gradient_is_that_of_the_steps():
    """By gradcheck: the decay is a function of the gate's weights with the factor in it."""
    mask, x = make("full"), torch.randn(1, 6, 8, DIM, dtype=torch.float64)
    weight = mask.gate.weight.detach().requires_grad_()

    def of_weight(weight):
        return torch.func.functional_call(mask, {"gate.weight": weight}, (x,))

    assert torch.autograd.gradcheck(of_weight, weight, fast_mode=True)


@pytest.mark.parametrize("kind", WITH_IT)
def test_it_goes_through_json(kind):
    value = KINDS[kind](reference_grid=[5, 6]).resolved()
    assert value.reference_grid == (5, 6)
    assert value.config["reference_grid"] == [5, 6]
    assert as_kind(json.loads(json.dumps(value.config))) == value
    assert KINDS[kind]().resolved().config["reference_grid"] is None


PAIRWISE = ["full", "fixed", "learned", "alibi", "squared"]


@pytest.mark.parametrize("kind", PAIRWISE)
def test_positions_must_be_given_in_its_steps(kind):
    positions = Positions(*torch.zeros(2, 1, 3))
    says = (
        rf"reference_grid of kind '{kind}' needs a whole grid, .*: got Positions of 3 tokens. Leave it out; or, for "
        r"Positions of your own, say their grid_size, or give them in steps of the reference grid, h \* H0 / H and "
    )
    with pytest.raises(ValueError, match=says):
        make(kind)(torch.randn(1, 3, DIM, dtype=torch.float64), positions)


@pytest.mark.parametrize("kind", PAIRWISE)
def test_part_of_a_grid_is_measured_as_the_whole(kind):
    """Patch dropout, also of what is left already, and behind text."""
    mask, x = make(kind, num_prefix_tokens=1), torch.randn(1, 1 + 48, DIM, dtype=torch.float64)
    left = Grid(6, 8, 1).subset(torch.tensor([[40, 3, 17, 29]]), 1)
    for positions, text in ((left, []), (left.behind(1), [0]), (left.subset(torch.tensor([[0, 1, 2, 3]]), 1), [])):
        tokens = torch.tensor([*text, 0, 41, 4, 18, 30])
        whole = mask(x, Grid(6, 8, 1)).expand(1, -1, -1, -1)
        torch.testing.assert_close(mask(x[:, tokens], positions), whole[:, :, tokens][..., tokens])


def test_a_swapped_model_with_patch_dropout_measures_by_it():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2, img_size=64, patch_drop_rate=0.5)
    sd.swap_attention(model, kinds.Full(reference_grid=(2, 2), gate_bias_init=0.0))
    images = torch.randn(2, 3, 64, 64)
    layers = [module for module in model.modules() if isinstance(module, DecayAttention)]
    seen = []
    layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[3]))
    model.eval()(images)
    model.train()(images)
    assert seen[0].layout.is_grid
    assert seen[1].layout.grid_size == (4, 4)


def test_positions_in_its_steps_are_the_same():
    """What the error says to do, on a grid that is larger in both directions alike."""
    mask, off = make("full"), make("full", None)
    off.load_state_dict(mask.state_dict())
    x = torch.randn(1, 48, DIM, dtype=torch.float64)
    h, w = Grid(6, 8).positions(device=x.device, dtype=x.dtype)
    torch.testing.assert_close(off(x, Positions(h[None] / 2, w[None] / 2)), mask(x, (6, 8)))


@pytest.mark.parametrize("kind", ["1d", "bidirectional", "none"])
def test_kinds_without_steps_have_no_such_option(kind):
    with pytest.raises(ValueError, match=f"'{kind}' has .*: got reference_grid. Leave out what it has not"):
        as_kind({"kind": kind, "reference_grid": [3, 4]})


def test_the_gaussians_old_name_is_refused():
    with pytest.raises(ValueError, match="'gaussian' has the options reference_grid: got initial_grid_size"):
        as_kind({"kind": "gaussian", "initial_grid_size": [3, 4]})


def test_models_fill_it_for_the_gaussian_alone():
    options = {"img_size": (32, 48), "dim": 16, "depth": 1, "num_heads": 2}
    for decay, expected in [("gaussian", [2, 3]), ("full", None), (kinds.Full(reference_grid=(5, 5)), [5, 5])]:
        assert sd.ViT(3, **options, decay=decay).config["decay"]["reference_grid"] == expected
    for decay, expected in [("gaussian", [4, 4]), ("learned", None)]:
        model = sd.SDTP(8, 2, 4, 10, dim=16, depth=1, num_heads=2, decay=decay)
        assert model.config["decay"]["reference_grid"] == expected
    assert kinds.Gaussian().resolved(grid_size=(7, 8)).reference_grid == (7, 8)
    assert kinds.Gaussian(reference_grid=(2, 2)).resolved(grid_size=(7, 8)).reference_grid == (2, 2)


def test_each_stage_has_its_own():
    """One value for all stages is that of the first map; at the size trained on nothing changes."""
    options = {"embed_dims": (16, 32, 32), "depths": (1, 1, 1), "num_heads": (2, 2, 2), "stem_stride": 1}
    plain = sd.SDTH(3, **options, decay="full").eval()
    model = sd.SDTH(3, **options, decay=kinds.Full(reference_grid=(7, 9)), rope_reference_grid=(7, 9)).eval()
    grids = [(7, 9), (4, 5), (2, 3)]
    assert [stage.blocks[0].attn.decay.kind.reference_grid for stage in model.stages] == grids
    assert [stage.blocks[0].attn.rope.reference_grid for stage in model.stages] == grids
    model.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 7, 9)
    assert torch.equal(model(image), plain(image))
    assert not torch.allclose(model(torch.randn(1, 3, 14, 18)), plain(torch.randn(1, 3, 14, 18)))
    again = sd.SDTH(**json.loads(json.dumps(model.config)))
    assert [stage.blocks[0].attn.decay.kind.reference_grid for stage in again.stages] == grids
    assert [stage.blocks[0].attn.rope.reference_grid for stage in again.stages] == grids


def test_a_vit_keeps_that_of_its_rotary_embedding():
    model = sd.ViT(3, img_size=32, patch_size=8, dim=16, depth=1, num_heads=2, rope="axial", rope_reference_grid=(4, 4))
    assert model.config["rope_reference_grid"] == [4, 4]
    assert sd.ViT(**model.config).blocks[0].attn.rope.reference_grid == (4, 4)
    with pytest.raises(ValueError, match="needs rope='axial': got rope='none'"):
        sd.ViT(3, img_size=32, patch_size=8, dim=16, depth=1, num_heads=2, rope_reference_grid=(4, 4))
