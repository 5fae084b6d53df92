"""SDT-H: shapes, sizes against the paper, features, checkpointing, saving, errors."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import spatial_decay as sd
from spatial_decay.layers.kinds import KINDS
from spatial_decay.models import SDTH

SMALL = {
    "embed_dims": [16, 32, 48, 64],
    "depths": [1, 1, 2, 1],
    "num_heads": [2, 2, 3, 4],
    "projection_dim": 32,
}


def small(**overrides) -> SDTH:
    return SDTH(5, **(SMALL | overrides))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (95, 65)])
def test_any_size_from_32_up(size):
    model = small().eval()
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 5)
    last, maps = model.forward_intermediates(x)
    height, width = size
    for stage, (features, dim) in enumerate(zip(maps, SMALL["embed_dims"], strict=True)):
        stride = 4 * 2**stage
        assert features.shape == (2, dim, -(-height // stride), -(-width // stride))
    assert torch.equal(last, maps[-1])
    assert torch.equal(model.forward_features(x), maps[-1])
    assert torch.equal(model.forward_head(maps[-1]), model(x))


def test_features_by_index():
    model = small().eval()
    x = torch.randn(1, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    last, some = model.forward_intermediates(x, [0, -2])
    assert all(torch.equal(a, b) for a, b in zip(some, (maps[0], maps[2]), strict=True))
    assert torch.equal(last, maps[3])
    stopped, some = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(stopped, maps[1])
    assert torch.equal(some[0], maps[1])
    for wrong in ([4], [-5], []):
        with pytest.raises(ValueError, match="indices must name stages from 0 to 3"):
            model.forward_intermediates(x, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_every_parameter(kind):
    model = small(decay=kind, init_values=[None, 1e-2, None, 1e-2], drop_path_rate=0.0)
    model(torch.randn(2, 3, 64, 40)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [8, 9, 12])
def test_small_images(size):
    model = small(stem_stride=1, in_chans=1).eval()
    _, maps = model.forward_intermediates(torch.randn(1, 1, size, size))
    assert maps[0].shape[-2:] == (size, size)
    assert small(stem_stride=2).eval()(torch.randn(1, 3, 16, 17)).shape == (1, 5)


def test_the_stem_is_channels_last_on_cpus():
    model, seen = small().eval(), []
    for layer in model.stem.proj:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    wanted = model.stem.proj(x := torch.randn(1, 3, 32, 40)).permute(0, 2, 3, 1)
    seen.clear()
    found = model.stem(x)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted)


# Paper, Table 1: parameters (million) and GFLOPs at 224 x 224; the counter counts two operations a product.
@pytest.mark.parametrize(
    ("build", "parameters", "paper_parameters", "gflops", "paper_gflops"),
    [
        (sd.sdt_h_tiny, 14_397_704, 14, 2.654, 2.7),
        (sd.sdt_h_small, 27_101_384, 27, 5.113, 4.8),
        (sd.sdt_h_base, 54_426_000, 54, 10.969, 10.8),
    ],
)
def test_size_against_the_paper(build, parameters, paper_parameters, gflops, paper_gflops):
    with torch.device("meta"):
        model = build().eval()
        x = torch.randn(1, 3, 224, 224)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == parameters
    assert round(count / 1e6) == paper_parameters
    with FlopCounterMode(display=False) as counter:
        model(x)
    counted = counter.get_total_flops() / 2e9
    assert counted == pytest.approx(gflops, abs=1e-3)
    assert counted == pytest.approx(paper_gflops, rel=0.1)


def test_structure_of_the_tables():
    with torch.device("meta"):
        model = sd.sdt_h_base()
    assert [len(stage.blocks) for stage in model.stages] == [4, 8, 25, 8]
    first = [stage.blocks[0] for stage in model.stages]
    assert [block.attn.decay.kind.name for block in first] == ["decomposed", "decomposed", "full", "full"]
    assert [block.attn.num_heads for block in first] == [5, 5, 10, 16]
    assert [isinstance(block.ls1, torch.nn.Identity) for block in first] == [True, True, False, False]
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.4, 45).tolist())


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_checkpointing_equals_plain(drop_path_rate):
    model = small(drop_path_rate=drop_path_rate)
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_saved_config_and_weights_give_the_same_logits(tmp_path):
    model = small(
        decay=["fixed_decomposed", "bidirectional", sd.kinds.Full(alpha=0.2), "1d"], init_values=[None, 1e-3, None, 1]
    )
    model.reset_classifier(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model(torch.randn(4, 3, 64, 64))  # moves the running statistics
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(model.config))

    again = SDTH(**json.loads((tmp_path / "config.json").read_text()))
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again.config == model.config


def test_reset_classifier():
    model = small().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(0)
    features = model(x)
    assert features.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.config["num_classes"] == 9


def test_no_weight_decay_names_parameters_that_exist():
    model = small(init_values=[1.0] * 4)
    names = dict(model.named_parameters())
    skipped = model.no_weight_decay()
    assert skipped <= set(names)
    assert {"stages.0.blocks.0.norm1.weight", "stages.0.blocks.0.ls1.gamma", "head.bias"} <= skipped
    assert "stages.0.blocks.0.attn.decay.gate_h.weight" not in skipped


def test_weights_start_as_in_rmt_and_the_output_gate_around_one():
    model = small(num_heads=[2, 2, 3, 4])
    assert model.stages[2].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stages[2].blocks[0].attn.output_gate.up.mean().item() == pytest.approx(2 / 16, rel=0.01)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.randn(1, 3, 31, 64), ValueError, "at least 32 x 32, the total stride: got 31 x 64"),
        (torch.randn(1, 1, 64, 64), ValueError, r"\(B, 3, H, W\): got shape \(1, 1, 64, 64\)"),
        (torch.randn(3, 64, 64), ValueError, r"\(B, 3, H, W\): got shape \(3, 64, 64\)"),
        (torch.ones(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating point: got torch.uint8"),
        (torch.randn(1, 3, 64, 64, dtype=torch.float64), TypeError, "images must have the dtype of the weights"),
    ],
)
def test_impossible_images_are_refused(x, error, says):
    with pytest.raises(error, match=says):
        small()(x)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ({"depths": [1, 1]}, ValueError, "one value a stage: got 4 embed_dims, 2 depths, 4 num_heads"),
        ({"depths": [1, 1, 0, 1]}, ValueError, r"depths must hold whole numbers >= 1: got \[1, 1, 0, 1\]"),
        ({"depths": -1}, ValueError, "depths must be a whole number >= 1: got -1"),
        ({"num_heads": [2, 2, 3.0, 4]}, ValueError, r"num_heads must hold whole numbers >= 1: got \[2, 2, 3.0, 4\]"),
        ({"projection_dim": -2}, ValueError, "projection_dim must be a whole number >= 0: got -2"),
        ({"stem_stride": 3}, ValueError, "stem_stride must be one of 1, 2, 4: got 3"),
        ({"embed_dims": [15, 32, 48, 64]}, ValueError, "must be even"),
        ({"decay": ["full", "full", "full", "gauss"]}, ValueError, "got 'gauss'"),
        ({"gate_ranks": 3}, TypeError, "SDTH has no keyword gate_ranks"),
        (
            {"heads_range": 4.0},
            TypeError,
            "SDTH has no keyword heads_range: its own are num_classes, in_chans, embed_d",
        ),
        ({"heads_range": 4.0}, TypeError, "Options of a kind belong to decay, for instance decay=.*'heads_range'"),
        ({"num_prefix_tokens": 1}, TypeError, "SDTH has no keyword num_prefix_tokens"),
        ({"decay": ["full", "1d"]}, ValueError, "one value a stage: got 4 embed_dims, .* 2 decay. Pass lists"),
        ({"decay": ["full", {"alpha": 1}] * 2}, ValueError, 'a decay as a mapping must say its "kind"'),
        ({"decay": [{"kind": "1d", "alpha": 1}] * 4}, ValueError, "kind '1d' has the options .*: got alpha"),
        ({"embed_dims": "64"}, ValueError, "embed_dims must be one value for all stages, or a list .*: got '64'"),
        ({"init_values": {}}, ValueError, "init_values must be one value for all stages, or a list .*: got {}"),
        ({"depths": []}, ValueError, r"depths must be one value for all stages, or a list with one .*: got \[\]"),
        (
            {"embed_dims": 8, "depths": 1, "num_heads": 1, "decay": "full"},
            ValueError,
            "one value a stage: got no list at all. Pass lists of the same length, at least one",
        ),
    ],
)
def test_impossible_options_are_refused(overrides, error, says):
    with pytest.raises(error, match=says):
        small(**overrides)


def test_images_and_their_gradients_under_vmap():
    model = sd.sdt_h_tiny(3, depths=1, embed_dims=8, num_heads=1, projection_dim=8).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(images), model(images))

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    weights = dict(model.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    name = "stages.0.blocks.0.attn.decay.gate_h.weight"
    for i, image in enumerate(images):
        torch.testing.assert_close(each[name][i], torch.autograd.grad(loss(weights, image), weights[name])[0])
