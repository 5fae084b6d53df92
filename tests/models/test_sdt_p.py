"""SDT-P: DiT's outputs from DiT's weights, its interface, sizes and starts, and what it refuses."""

import pytest
import torch

import spatial_decay as sd
from spatial_decay.decay import GaussianDecay
from spatial_decay.layers.kinds import KINDS
from spatial_decay.layout import Grid
from spatial_decay.models.sdt_p import SDTPBlock, sincos_positions
from tests.golden import make_dit, read

BUILDS = (sd.sdt_p_small, sd.sdt_p_base, sd.sdt_p_large, sd.sdt_p_xlarge)
DIT = {"decay": "none", "rope": "none", "lpe_kernel_size": 0, "gate_rank": 0}


def small(**options):
    """With weights everywhere: a fresh one gives zeros."""
    model = sd.SDTP(8, 2, 4, 5, **({"dim": 48, "depth": 2, "num_heads": 3} | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(batch_size=2, size=(8, 8)):
    return torch.randn(batch_size, 4, *size), torch.tensor([10, 900])[:batch_size], torch.tensor([3, 5])[:batch_size]


@torch.no_grad()
def test_it_is_dit():
    golden = read("dit")
    model = make_dit(golden, **DIT).eval()
    report = sd.load_checkpoint(model, golden.state, origin="dit")
    assert report.is_complete
    assert report.derived == ("pos_embed",)
    x, t, y = (torch.from_numpy(golden.arrays[f"io/{name}"]) for name in ("x", "t", "labels"))
    torch.testing.assert_close(model(x, t, y), torch.from_numpy(golden.arrays["io/y"]), rtol=1e-5, atol=1e-5)
    guided = model.forward_with_cfg(x, t, y, 2.5)
    torch.testing.assert_close(guided, torch.from_numpy(golden.arrays["io/y_cfg"]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_converted_dit_starts_where_it_was():
    """Under 1 percent, with a gate that begins near zero decay; the report lists what is new."""
    golden = read("dit")
    options = DIT | {"decay": sd.kinds.Full(gate_bias_init=6.0)}
    model = make_dit(golden, **options).eval()
    report = sd.load_checkpoint(model, golden.state, origin="dit")
    assert report.is_complete
    assert set(report.new) == {f"blocks.{i}.attn.decay.gate.{name}" for i in range(2) for name in ("weight", "bias")}
    assert "new in the model: blocks.0.attn.decay.gate.weight" in str(report)
    x, t, y = (torch.from_numpy(golden.arrays[f"io/{name}"]) for name in ("x", "t", "labels"))
    expected = torch.from_numpy(golden.arrays["io/y"])
    moved = (model(x, t, y) - expected).norm() / expected.norm()
    assert 1e-6 < moved < 0.01


def test_a_checkpoint_of_another_width():
    golden = read("dit")
    model = make_dit(golden, dim=96, **DIT)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"patch_embed.proj.weight: the model has \(96, 4, 2, 2\), the checkpoint \(48, "
    ):
        sd.load_checkpoint(model, golden.state, origin="dit")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_positions_that_are_not_the_fixed_ones():
    golden = read("dit")
    state = golden.state | {"pos_embed": golden.state["pos_embed"] + 0.1}
    with pytest.raises(ValueError, match="not in the model: pos_embed"):
        sd.load_checkpoint(make_dit(golden, **DIT), state, origin="dit")


@pytest.mark.parametrize(("build", "millions"), list(zip(BUILDS, (33.5, 131.6, 461.1, 679.1), strict=True)))
def test_sizes_of_the_paper(build, millions):
    """The paper: 33, 132, 462 and 679 million; DiT counts its fixed positions, a number for each feature."""
    with torch.device("meta"):
        model = build()
    counted = sum(parameter.numel() for parameter in model.parameters()) + 16 * 16 * model.dim
    assert round(counted / 1e6, 1) == millions


@torch.no_grad()
def test_a_fresh_model_gives_zeros():
    model = sd.SDTP(8, 2, 4, 5, dim=48, depth=2, num_heads=3)
    assert not model(*inputs()).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind):
    model = small(decay=kind).train()
    model(*inputs(size=(4, 12))).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@torch.no_grad()
def test_latents_of_other_sizes():
    model = small(decay="full")
    assert model(*inputs(size=(12, 6))).shape == (2, 8, 12, 6)
    one = model(*inputs(1, size=(16, 16)))
    assert one.isfinite().all()
    assert torch.equal(sincos_positions(48, Grid(4, 6))[7], sincos_positions(48, Grid(9, 6))[7])
    assert small(learn_sigma=False)(*inputs()).shape == (2, 4, 8, 8)


@torch.no_grad()
def test_patches_come_back_where_they_were():
    """A head that copies: each patch to its own place, channels first."""
    model = sd.SDTP(8, 2, 1, 0, dim=4, depth=1, num_heads=1, learn_sigma=False)
    model.head.weight.copy_(torch.eye(4))
    x = torch.arange(64.0).view(1, 1, 8, 8)
    patches = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)  # (1, 16, 4)
    assert torch.equal(model._to_latents(patches, Grid(4, 4)), x)


@torch.no_grad()
def test_without_classes():
    model = sd.SDTP(8, 2, 4, 0, dim=48, depth=1, num_heads=3).eval()
    x, t, y = inputs()
    assert model(x, t).shape == (2, 8, 8, 8)
    with pytest.raises(ValueError, match="takes no labels"):
        model(x, t, y)
    with pytest.raises(ValueError, match="needs a model with classes"):
        model.forward_with_cfg(x, t, y, 2.0)


@torch.no_grad()
def test_guidance():
    model = small()
    x, t, _ = inputs()
    x, t = torch.cat([x[:1], x[:1]]), t[:1].expand(2)
    y = torch.tensor([2, 5])
    plain, none = model(x, t, y), model.forward_with_cfg(x, t, y, 1.0)
    torch.testing.assert_close(none[0], torch.cat([plain[0, :3], plain[0, 3:]]))
    every = model.forward_with_cfg(x, t, y, 3.0, guided_channels=4)
    torch.testing.assert_close(every[0, :4], plain[1, :4] + 3 * (plain[0, :4] - plain[1, :4]))
    assert torch.equal(every[0, :4], every[1, :4])


def test_labels_are_dropped_in_training_only():
    model = small(class_dropout_prob=0.5)
    y = torch.zeros(1000, dtype=torch.long)
    assert model._drop_labels(y).eq(0).all()
    share = model.train()._drop_labels(y).eq(5).float().mean()
    assert 0.4 < share < 0.6


def test_checkpointing_and_config():
    model = small(decay="full", rope="flat").train()
    x, t, y = inputs()
    model.class_dropout_prob = 0.0
    plain = torch.autograd.grad(model(x, t, y).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(x, t, y).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    twin = sd.SDTP(**model.config)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x, t, y), model.eval()(x, t, y))


def test_gaussians_start_from_its_grid():
    model = small(decay="gaussian")
    assert model.blocks[0].attn.decay.gaussian.reference_grid == (4, 4)
    wide = sd.SDTP((4, 8), 2, 4, 5, dim=48, depth=1, num_heads=3, decay="gaussian")
    assert wide.blocks[0].attn.decay.gaussian.reference_grid == (2, 4)
    assert isinstance(model.blocks[0].attn.decay.describe(torch.randn(1, 16, 48), (4, 4)), GaussianDecay)


@torch.no_grad()
def test_a_block_takes_layouts_and_maps_as_sdtblock_does():
    block = SDTPBlock(48, 3)
    torch.nn.init.normal_(block.modulation.weight, std=0.1)
    x, condition = torch.randn(2, 3, 5, 48), torch.randn(2, 48)
    expected = block(x.flatten(1, 2), condition, Grid(3, 5))
    assert torch.equal(block(x.flatten(1, 2), condition, (3, 5)), expected)
    assert torch.equal(block(x, condition), expected.view_as(x))
    with pytest.raises(ValueError, match="without layout, L - num_prefix_tokens must be a square: got L = 15"):
        block(x.flatten(1, 2), condition)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.randn(2, 4, 7, 8)}, ValueError, "multiples of patch_size = 2: got 7 x 8"),
        ({"x": torch.randn(2, 3, 8, 8)}, ValueError, r"latents must be \(B, 4, H, W\)"),
        ({"x": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, TypeError, "latents must be floating point"),
        ({"t": torch.tensor(3)}, ValueError, r"timesteps must be \(2,\), one a latent: got shape \(\)"),
        ({"t": torch.zeros(2, 1)}, ValueError, r"timesteps must be \(2,\)"),
        ({"y": None}, ValueError, r"labels must be \(2,\), one a latent: got none"),
        ({"y": torch.tensor([1.0, 2.0])}, TypeError, "labels must be whole numbers: got torch.float32"),
        ({"y": torch.tensor([0, 6])}, ValueError, "labels must be 0 .. 4, or 5 for no class: got 0 .. 6"),
        ({"y": torch.tensor([-1, 2])}, ValueError, "got -1 .. 2"),
    ],
)
def test_bad_inputs(change, error, says):
    x, t, y = inputs()
    with pytest.raises(error, match=says):
        small()(**({"x": x, "t": t, "y": y} | change))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"dim": 42, "num_heads": 3}, ValueError, "multiple of 4"),
        ({"class_dropout_prob": 1.0}, ValueError, "class_dropout_prob must satisfy"),
        ({"num_register": 1}, TypeError, "SDTP has no keyword num_register"),
        ({"depth": 0}, ValueError, "depth must be a whole number >= 1: got 0"),
        ({"num_heads": 3.0}, ValueError, "num_heads must be a whole number >= 1: got 3.0"),
        ({"num_classes": -1}, ValueError, "num_classes must be a whole number >= 0: got -1"),
        ({"num_classes": "10"}, ValueError, "num_classes must be a whole number >= 0: got '10'"),
        ({"patch_size": 3}, ValueError, "input_size must be a multiple of patch_size"),
        ({"input_size": (8, 7)}, ValueError, r"a multiple of patch_size: got input_size=\(8, 7\), patch_size=2"),
        ({"input_size": (8,)}, ValueError, r"input_size must be one whole number or \(H, W\): got \(8,\)"),
    ],
)
def test_impossible_options(options, error, says):
    with pytest.raises(error, match=says):
        sd.SDTP(**({"input_size": 8, "dim": 48, "depth": 1, "num_heads": 3} | options))
