"""timm's doors: what timm's own model tests ask of a registered model, and our layers in timm's VisionTransformer."""

import copy
import math
import pickle

import pytest
import timm
import torch

import spatial_decay as sd
from spatial_decay.integrations.timm import TimmAttention, TimmBlock, attention_layer, block_layer
from spatial_decay.models.registry import ENTRIES

PLAIN = ["locatvit_tiny", "locatvit_small", "locatvit_base"]
HIERARCHICAL = [name for name, entry in ENTRIES.items() if entry.images is not None and name not in PLAIN]
every = pytest.mark.parametrize("name", [*HIERARCHICAL, *PLAIN])
one_of_each = pytest.mark.parametrize("name", ["sdt_h_base", "rmt_tiny", "locatvit_tiny"])


SMALL_PLAIN = {"dim": 16, "depth": 4, "num_heads": 2}
SMALL = {"embed_dims": [8, 16, 24, 32], "depths": [2, 1, 2, 1], "num_heads": [2, 2, 3, 4], "projection_dim": 20}
BLOCKS = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]  # stage and block


def make(name, **keywords):
    return timm.create_model(name, **((SMALL_PLAIN if ENTRIES[name].model is sd.ViT else SMALL) | keywords))


def test_names():
    assert set(timm.list_models(module="timm")) == {*HIERARCHICAL, *PLAIN}
    assert not timm.list_pretrained("sdt_h_*")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for sdt_h_tiny"):
        make("sdt_h_tiny", pretrained=True)


@pytest.mark.parametrize("name", [*HIERARCHICAL, *PLAIN])
def test_full_size_is_the_librarys(name):
    with torch.device("meta"):
        model, ours = timm.create_model(name), getattr(sd.models, name)()
    assert model.config == ours.config
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}


@every
def test_forward_and_backward(name):
    model = make(name, num_classes=42, in_chans=1, drop_rate=0.1, drop_path_rate=0.1)
    out = model(torch.randn(2, 1, 64, 64))
    out.mean().backward()
    assert out.shape == (2, 42)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
    assert model.head_drop.p == model.config["drop_path_rate"] == 0.1


@every
@torch.no_grad()
def test_settings_are_true(name):
    model = make(name).eval()
    settings, weights, x = model.default_cfg, model.state_dict(), torch.randn(1, 3, 224, 224)
    assert settings["input_size"] == (3, 224, 224)
    assert {settings["classifier"] + ".weight", settings["first_conv"] + ".weight"} <= set(weights)
    assert weights[settings["first_conv"] + ".weight"].shape[1] == 3
    assert weights["head.weight"].shape[0] == settings["num_classes"] == model.num_classes == 1000

    features = model.forward_features(x)
    assert features.shape[-1 if name in PLAIN else 1] == model.num_features
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pre_logits)

    without = make(name, num_classes=0, global_pool="").eval()(x)
    if name in HIERARCHICAL:
        assert features.shape[2:] == without.shape[2:] == settings["pool_size"]
    else:
        assert features.shape == without.shape == (1, 1 + 14 * 14, 16)


def test_settings_for_data():
    config = timm.data.resolve_data_config(model=make("rmt_tiny"))
    assert (config["mean"], config["crop_pct"]) == ((0.485, 0.456, 0.406), 0.875)
    config = timm.data.resolve_data_config(model=make("locatvit_tiny"))
    assert (config["mean"], config["crop_pct"]) == ((0.5, 0.5, 0.5), 0.9)


@every
@pytest.mark.parametrize("out_indices", [None, (0, 2), 2], ids=str)
@torch.no_grad()
def test_features_only(name, out_indices):
    model = make(name, features_only=True, **({} if out_indices is None else {"out_indices": out_indices})).eval()
    whole, x = make(name).eval(), torch.randn(2, 3, 64, 96)
    whole.load_state_dict({n.removeprefix("model."): w for n, w in model.state_dict().items()}, strict=False)
    default = [1, 2, 3] if name in PLAIN else [0, 1, 2, 3]
    numbers = {None: default, (0, 2): [0, 2], 2: [2, 3]}[out_indices]
    maps, info = model(x), model.feature_info
    assert len(maps) == len(numbers) == len(info.channels())
    for got, expected in zip(maps, whole.forward_intermediates(x, numbers, intermediates_only=True), strict=True):
        assert torch.equal(got, expected)
    for got, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert got.shape == (2, channels, math.ceil(64 / stride), math.ceil(96 / stride))
    assert info.module_name() == [whole.feature_info[i]["module"] for i in numbers]


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@torch.no_grad()
def test_output_stride(output_stride):
    """As DeepLabV3+ and PAN ask for it."""
    keywords = {"features_only": True, "output_stride": output_stride}
    model, whole = make("rmt_tiny", **keywords, feature_cls="list").eval(), make("rmt_tiny", features_only=True).eval()
    strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    assert model.feature_info.reduction() == strides
    whole.load_state_dict(model.state_dict())  # the same weights
    maps, x = [], torch.randn(1, 3, 64, 90)
    for got, expected, stride in zip(model(x), whole(x), strides, strict=True):
        assert got.shape == (1, expected.shape[1], math.ceil(64 / stride), math.ceil(90 / stride))
        maps.append(got.shape == expected.shape and torch.equal(got, expected))
    assert maps == [stride == plain for stride, plain in zip(strides, (4, 8, 16, 32), strict=True)]
    first = make("rmt_tiny", **keywords, out_indices=(0,)).model
    assert sd.SDTH(**first.config)(x).shape == (1, 8, 16, 23)


@one_of_each
def test_every_parameter_of_a_feature_model_trains(name):
    model = make(name, features_only=True, drop_path_rate=0.0)
    sum(features.square().mean() for features in model(torch.randn(2, 3, 64, 64))).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name


@one_of_each
def test_checkpointing_equals_plain(name):
    model, x = make(name), torch.randn(2, 3, 64, 64)
    parameters, gradients = list(model.parameters()), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(x).square().sum(), parameters))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@one_of_each
def test_layer_wise_learning_rates(name):
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model = make(name)
    layer = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layer) == {n for n, _ in model.named_parameters()}
    stem = "patch_embed.proj.weight" if name in PLAIN else "stem.proj.0.weight"
    blocks = [f"blocks.{i}" for i in range(4)] if name in PLAIN else [f"stages.{i}.blocks.{j}" for i, j in BLOCKS]
    order = [layer[stem], *(layer[f"{block}.attn.qkv.weight"] for block in blocks), layer["head.weight"]]
    assert order == list(range(len(blocks) + 2))
    if name in HIERARCHICAL:
        assert layer["stages.1.downsample.norm.weight"] == layer["stages.1.blocks.0.attn.qkv.weight"]
        assert layer["head_proj.weight"] == layer["stages.3.blocks.0.attn.qkv.weight"]
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    skipped = model.no_weight_decay()
    assert {n for n, p in model.named_parameters() if id(p) not in decayed} == skipped
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1.0
    assert scale[id(model.get_submodule(model.default_cfg["first_conv"]).weight)] == 0.5 ** (len(blocks) + 1)


@one_of_each
@torch.no_grad()
def test_timm_loads_weights_for_other_images_and_classes(name, tmp_path):
    source = make(name, num_classes=5).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    same = make(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(same(x), source(x))
    other = make(name, pretrained=True, num_classes=7, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    grey = torch.randn(1, 1, 64, 64)
    assert other(grey).shape == (1, 7)
    expected = source.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(other.forward_features(grey), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_images_that_are_not_square():
    model = make("locatvit_tiny", img_size=(64, 96), num_classes=3).eval()
    assert model.config["img_size"] == [64, 96]
    assert model.pos_embed.shape[1] == 1 + 4 * 6
    assert model.blocks[0].attn.decay.gaussian.reference_grid == (4, 6)
    assert model(torch.randn(1, 3, 64, 96)).shape == model(torch.randn(1, 3, 96, 64)).shape == (1, 3)
    assert make("locatvit_tiny", img_size=64).config["img_size"] == 64


def test_keywords_that_cannot_be_are_refused():
    for name, keywords, error, says in [
        ("locatvit_tiny", {"img_size": (64, 90)}, ValueError, r"img_size must be a multiple of .*img_size=\(64, 90\)"),
        (
            "locatvit_tiny",
            {"img_size": (64,)},
            ValueError,
            r"img_size must be one whole number or \(H, W\): got \(64,\)",
        ),
        ("rmt_tiny", {"img_size": 64}, TypeError, "rmt_tiny has no keyword img_size: it takes images of any size"),
        ("rmt_tiny", {"global_pool": "max"}, ValueError, "global_pool must be one of 'avg', '': got 'max'"),
        ("sdt_h_tiny", {"window_size": 7}, TypeError, "SDTH has no keyword window_size"),
        ("sdt_h_tiny", {"out_indices": (0,)}, TypeError, "SDTH has no keyword out_indices"),
        ("locatvit_tiny", {"reg_tokens": 4}, TypeError, "ViT has no keyword reg_tokens"),
        ("sdt_h_tiny", {"features_only": True, "feature_cls": "hook"}, ValueError, "'getter' or 'list': got 'hook'"),
        ("sdt_h_tiny", {"feature_cls": "list"}, TypeError, "SDTH has no keyword feature_cls"),
        ("sdt_h_tiny", {"output_stride": 12}, ValueError, r"one of 4, 8, 16, 32, or None: got 12"),
        ("locatvit_tiny", {"output_stride": 8}, TypeError, "ViT has no keyword output_stride"),
        (
            "sdt_h_tiny",
            {"features_only": True, "out_indices": (4,)},
            ValueError,
            "indices must name stages from 0 to 3",
        ),
    ]:
        with pytest.raises(error, match=says):
            make(name, **keywords)


# Our layers in timm's VisionTransformer.

NO_PARTS = {"decay": "none", "rope": "none", "lpe_kernel_size": 0, "gate_rank": 0}
NO_CONVOLUTIONS = {"pos_kernel_size": 0, "mlp_kernel_size": 0}


def door_id(door):
    return "-".join([*door, *("made" for layer in door.values() if layer is not TimmAttention)])


def vit(**keywords):
    small = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(small | keywords))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"qk_norm": True, "qkv_bias": False, "init_values": 0.1},
        {"qk_norm": True, "norm_layer": "rmsnorm", "class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"proj_bias": False},
    ],
    ids=lambda keywords: "-".join(keywords) or "default",
)
@pytest.mark.parametrize("door", ["attn_layer", "block_fn"])
@torch.no_grad()
def test_with_every_part_off_it_is_timms_own(door, keywords):
    prefix = int(keywords.get("class_token", True)) + keywords.get("reg_tokens", 0)
    if door == "attn_layer":
        layer = attention_layer(num_prefix_tokens=prefix, **NO_PARTS)
    else:
        layer = block_layer(num_prefix_tokens=prefix, **NO_PARTS, **NO_CONVOLUTIONS)
        if "proj_bias" in keywords:
            with pytest.raises(ValueError, match=r"TimmBlock cannot do what timm asks for:\n  - proj_bias=False"):
                vit(block_fn=layer, **keywords)
            return
    theirs, ours = vit(**keywords).eval(), vit(**{door: layer}, **keywords).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("decay", ["full", "fixed", "1d", "gaussian"])
@torch.no_grad()
def test_decay_is_that_of_the_layer(decay):
    x = torch.randn(2, 17, 16)
    block = vit(attn_layer=attention_layer(decay, gate_rank=3)).blocks[1]
    assert type(block) is timm.models.vision_transformer.Block
    assert isinstance(block.attn, TimmAttention)
    attn = sd.SpatialDecayAttention(16, 2, decay=decay, num_prefix_tokens=1, gate_rank=3)
    attn.load_state_dict(block.attn.state_dict())
    mask = torch.rand(17, 17) > 0.5
    assert torch.equal(block.attn(x, attn_mask=mask, is_causal=False), attn(x, (4, 4), mask))

    block = vit(block_fn=block_layer(decay, gate_rank=3, pos_kernel_size=0)).blocks[1].eval()
    assert isinstance(block, TimmBlock)
    ours = sd.SDTBlock(16, 2, mlp_ratio=4, decay=decay, num_prefix_tokens=1, gate_rank=3, pos_kernel_size=0)
    ours.load_state_dict(block.state_dict())
    assert torch.equal(block(x, attn_mask=mask, is_causal=False), ours(x, (4, 4), mask))


@pytest.mark.parametrize(
    "door", [{"attn_layer": TimmAttention}, {"attn_layer": attention_layer()}, {"block_fn": block_layer()}], ids=door_id
)
def test_training_in_timm(door):
    model = vit(drop_path_rate=0.1, attn_drop_rate=0.1, drop_rate=0.1, **door)
    assert model.blocks[1].attn.attn_drop == 0.1
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 64, 64)).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    features = vit(features_only=True, out_indices=(0, 1), **door)(torch.randn(1, 3, 64, 64))
    assert [f.shape for f in features] == [(1, 16, 4, 4)] * 2


@torch.no_grad()
def test_our_attention_has_a_name_in_timm():
    named, ours = vit(attn_layer="spatial_decay").eval(), vit(attn_layer=attention_layer()).eval()
    assert type(named.blocks[0].attn) is TimmAttention
    ours.load_state_dict(named.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(named(x), ours(x))


def test_options_keep_their_place():
    model = vit(
        attn_layer=attention_layer(sd.kinds.Full(alpha=0.3), backend="math"), proj_drop_rate=0.2, dtype=torch.bfloat16
    )
    attn = model.blocks[0].attn
    assert (attn.decay.kind.alpha, attn.attention.backend, attn.proj_drop.p) == (0.3, "math", 0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert vit(attn_layer=attention_layer(), device="meta").blocks[0].attn.qkv.weight.is_meta
    assert vit(block_fn=block_layer(), init_values=0).blocks[0].ls1.__class__ is torch.nn.Identity


@pytest.mark.parametrize(
    "door",
    [
        {"attn_layer": attention_layer(gate_rank=2)},
        {"block_fn": block_layer(sd.kinds.Full(alpha=0.3), gate_rank=2)},
        {"attn_layer": attention_layer({"kind": "1d", "gate_bias_init": 4.0}, gate_rank=2)},
    ],
    ids=door_id,
)
@torch.no_grad()
def test_a_whole_model_can_be_pickled(door):
    model, x = vit(**door).eval(), torch.randn(1, 3, 64, 64)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    assert again.blocks[0].attn.output_gate.down.shape[0] == 2
    assert again.blocks[0].attn.decay.kind == model.blocks[0].attn.decay.kind
    assert copy.deepcopy(model).blocks[0].attn.decay.kind == model.blocks[0].attn.decay.kind


def test_grids_that_timm_does_not_pass_are_refused():
    wide = {"img_size": (64, 96)}
    for door in ({"attn_layer": attention_layer()}, {"block_fn": block_layer()}):
        with pytest.raises(
            ValueError, match=r"must be a square: got L = 25, .* = 24\. .*spatial_decay\.swap_attention"
        ):
            vit(**door, **wide)(torch.randn(1, 3, 64, 96))
        with pytest.raises(ValueError, match="must be a square: got L = 19, num_prefix_tokens = 1"):
            vit(**door, reg_tokens=2)(torch.randn(1, 3, 64, 64))
    x = torch.randn(2, 25, 16)
    assert TimmAttention(16, 2)(x, (4, 6)).shape == x.shape
    with pytest.raises(ValueError, match="is_causal must be False: got True"):
        TimmAttention(16, 2)(x, (4, 6), is_causal=True)


def test_packed_images_of_naflex_are_refused():
    """With padding their patches, here 4 x 6 and one more, can count as a square."""
    model = timm.create_model(
        "naflexvit_base_patch16_gap",
        depth=1,
        embed_dim=16,
        num_heads=2,
        num_classes=5,
        reg_tokens=1,
        attn_layer="spatial_decay",
    )
    coordinates = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    coordinates = torch.cat([coordinates, torch.zeros(1, 2, dtype=torch.long)])[None]
    packed = {
        "patches": torch.randn(1, 25, 768),
        "patch_coord": coordinates,
        "patch_valid": torch.arange(25)[None] < 24,
    }
    with pytest.raises(ValueError, match=r"one of all images, .*\(1, 1, 26, 26\).*spatial_decay\.swap_attention"):
        model(packed)
    with pytest.raises(ValueError, match="must be a square: got L = 25"):
        model(torch.randn(1, 3, 64, 96))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_what_our_layers_cannot_do_is_refused():
    attention, block = attention_layer(), block_layer()
    for keywords, says in [
        ({"attn_layer": attention, "scale_attn_norm": True}, r"TimmAttention cannot .*\n  - scale_norm=True"),
        (
            {"block_fn": block, "scale_attn_norm": True, "scale_mlp_norm": True},
            r"scale_attn_norm=True.*\n.*scale_mlp_norm",
        ),
        ({"block_fn": block, "act_layer": "relu"}, r"act_layer=.*ReLU.* \(needs GELU\)"),
        ({"block_fn": block, "mlp_layer": timm.layers.GluMlp}, r"mlp_layer=.*GluMlp.* \(needs timm's Mlp\)"),
        (
            {"block_fn": block, "attn_layer": attention},
            r"attn_layer=.*block_layer\(decay=\.\.\.\) chooses the attention",
        ),
        ({"block_fn": block, "proj_drop_rate": 0.1}, r"proj_drop=0.1 \(needs 0\)"),
    ]:
        with pytest.raises(ValueError, match=says):
            vit(**keywords)
    for layer in (attention_layer, block_layer):
        with pytest.raises(TypeError, match="timm passes attn_drop, qkv_bias itself: give it to timm.create_model"):
            layer(qkv_bias=False, attn_drop=0.1)
    with pytest.raises(TypeError, match="gate_ranks"):
        vit(attn_layer=attention_layer(gate_ranks=3))
