"""ViT: sizes, positions, pooling, tokens, training; what LocAtViT adds is checked in test_peers.py."""

import pytest
import torch
import torch.nn.functional as F

import spatial_decay as sd
from spatial_decay.layers.kinds import KINDS
from spatial_decay.layers.patch import PatchEmbed


def make(decay="full", **options):
    options = {"img_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2} | options
    if decay in ("decomposed", "fixed_decomposed"):
        options |= {"class_token": False, "global_pool": "avg"}
    return sd.ViT(5, decay=decay, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_at_any_size(kind):
    model = make(kind, num_registers=0 if "decomposed" in kind else 2)
    out = model(torch.randn(2, 3, 32, 48))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@torch.no_grad()
def test_tokens_are_prefix_then_patches_with_positions():
    model = make("none", depth=1, num_registers=3).eval()
    model.blocks = torch.nn.ModuleList()
    torch.nn.init.normal_(model.cls_token)
    torch.nn.init.normal_(model.reg_token)
    x = torch.randn(2, 3, 32, 32)
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8).flatten(2).mT
    prefix = torch.cat([model.cls_token, model.reg_token], 1).expand(2, -1, -1)
    expected = model.norm(torch.cat([prefix, patches], 1) + model.pos_embed)
    torch.testing.assert_close(model.forward_features(x), expected)
    torch.testing.assert_close(model(x), model.head(expected[:, 0]))


@torch.no_grad()
def test_positions_are_interpolated():
    model = make("none")
    ramp = torch.linspace(0, 1, 4)[:, None].expand(4, 4).reshape(1, 16, 1).expand(-1, -1, 16)
    model.pos_embed[:, 1:] = ramp
    wide = model._positions(sd.Grid(4, 8, 1))
    assert wide.shape == (1, 1 + 32, 16)
    assert torch.equal(wide[:, :1], model.pos_embed[:, :1])  # the class token keeps its own
    torch.testing.assert_close(wide[0, 1:].reshape(4, 8, 16), ramp[0].reshape(4, 4, 16)[:, :1].expand(-1, 8, -1))
    assert model._positions(sd.Grid(4, 4, 1)) is model.pos_embed


@torch.no_grad()
def test_positions_of_images_that_are_not_square():
    model = make("gaussian", img_size=(16, 40)).eval()
    assert model.grid_size == model.blocks[0].attn.decay.gaussian.reference_grid == (2, 5)
    assert model.pos_embed.shape == (1, 1 + 10, 16)
    assert model._positions(sd.Grid(2, 5, 1)) is model.pos_embed
    ramp = torch.linspace(0, 1, 5).expand(2, 5).reshape(1, 10, 1).expand(-1, -1, 16)
    model.pos_embed[:, 1:] = ramp  # grows along w alone
    high = model._positions(sd.Grid(4, 5, 1))
    torch.testing.assert_close(high[0, 1:].reshape(4, 5, 16), ramp[0].reshape(2, 5, 16)[:1].expand(4, -1, -1))
    assert model(torch.randn(1, 3, 16, 40)).shape == model(torch.randn(1, 3, 40, 16)).shape == (1, 5)
    square = make("gaussian", img_size=32)
    assert square.state_dict().keys() == make("gaussian", img_size=(32, 32)).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_pooling(class_token):
    x = torch.randn(2, 3, 32, 32)
    model = make("none", global_pool="prr", class_token=class_token).eval()
    tokens = model.forward_features(x)
    heads = tokens.unflatten(-1, (2, 8)).transpose(1, 2)
    refined = (torch.softmax(heads @ heads.mT / 8**0.5, -1) @ heads).transpose(1, 2).flatten(2)
    expected = refined[:, 0] if class_token else refined.mean(1)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    maps = model.forward_maps(x)
    torch.testing.assert_close(maps.flatten(2).mT, refined[:, int(class_token) :])
    assert maps.shape == (2, 16, 4, 4)
    assert make("none", global_pool="avg").forward_maps(torch.randn(1, 3, 16, 40)).shape == (1, 16, 2, 5)


@torch.no_grad()
def test_patches_alone():
    patches = PatchEmbed(3, 8, patch_size=4)
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(patches(x), F.conv2d(x, patches.proj.weight, patches.proj.bias, stride=4).permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="patch_size must be >= 1: got 0"):
        PatchEmbed(3, 8, patch_size=0)
    with pytest.raises(TypeError, match="images must have the dtype of the weights: got torch.float64"):
        patches(x.double())


def test_refinement_refuses_maps():
    with pytest.raises(ValueError, match=r"x must be \(B, L, D\) with D a multiple of num_heads = 2: got shape"):
        sd.layers.PatchRepresentationRefinement(2)(torch.randn(2, 3, 3, 8))


def test_checkpointing_is_the_same():
    model = make("gaussian", global_pool="prr").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    model.set_grad_checkpointing()
    for got, wanted in zip(torch.autograd.grad(model(x).square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_config_and_weights_round_trip():
    model = sd.models.locatvit_tiny(7, depth=2, img_size=64, patch_size=16, num_registers=1, lpe_kernel_size=3).eval()
    other = sd.ViT(**model.config).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), other(x))


def test_a_new_classifier():
    model = make()
    model.reset_classifier(9)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 9)
    assert model.config["num_classes"] == 9
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 16)
    assert {"cls_token", "pos_embed", "norm.weight"} <= model.no_weight_decay()
    assert "patch_embed.proj.weight" not in model.no_weight_decay()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"global_pool": "max"}, ValueError, "global_pool must be one of 'token', 'avg', 'prr', '': got 'max'"),
        ({"class_token": False}, ValueError, "global_pool='token' needs class_token=True"),
        ({"img_size": 30}, ValueError, "img_size must be a multiple of patch_size: got img_size=30, patch_size=8"),
        ({"img_size": (32, 30)}, ValueError, r"img_size must be a multiple of patch_size: got img_size=\(32, 30\)"),
        ({"img_size": (8, 8, 8)}, ValueError, r"img_size must be one whole number or \(H, W\): got \(8, 8, 8\)"),
        ({"img_size": 32.0}, ValueError, r"img_size must be one whole number or \(H, W\): got 32.0"),
        ({"patch_size": 0}, ValueError, "patch_size must be a whole number >= 1: got 0"),
        ({"patch_size": 8.0}, ValueError, "patch_size must be a whole number >= 1: got 8.0"),
        ({"depth": 0}, ValueError, "depth must be a whole number >= 1: got 0"),
        ({"depth": True}, ValueError, "depth must be a whole number >= 1: got True"),
        ({"num_registers": -1}, ValueError, "num_registers must be a whole number >= 0: got -1"),
        ({"dim": 16.0}, ValueError, "dim must be a whole number >= 1: got 16.0"),
        ({"decays": ["full"]}, TypeError, "ViT has no keyword decays"),
    ],
)
def test_impossible_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        make("none", **options)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "images must be floating point: got torch.uint8"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"images must be \(B, 3, H, W\): got shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 36), ValueError, "must be multiples of patch_size = 8: got 32 x 36"),
        (torch.zeros(1, 3, 0, 32), ValueError, "must be multiples of patch_size = 8: got 0 x 32"),
    ],
)
def test_impossible_images_are_refused(x, error, says):
    with pytest.raises(error, match=says):
        make()(x)
