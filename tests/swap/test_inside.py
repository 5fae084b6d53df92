"""swap_attention where a tower or a backbone is inside, where images are packed or tokens come in; and why not."""

import contextlib
import importlib

import pytest
import torch
import transformers

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.checks import seen_at
from tests.swap.hosts import HF, HOSTS, STRONG, HostModel, InFloat64, full_masks

BY_NAME = {host.name: host for host in HOSTS}
WORDS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 20}


def test_the_language_model_behind_a_tower_has_one_reason():
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.SiglipVisionConfig(**HF),
            text_config=transformers.LlamaConfig(**WORDS),
            image_token_index=7,
        )
    )
    report = sd.swap_attention(model)
    assert report.replaced == tuple(f"model.vision_tower.encoder.layers.{i}.self_attn" for i in (0, 1))
    left = "left as it was: model.language_model.layers.0-1.self_attn, because LlamaAttention is causal"
    assert str(report).count("LlamaAttention") == 1
    assert left in str(report)


@pytest.mark.parametrize(
    ("model", "config", "tower", "words"),
    [
        ("LlavaForConditionalGeneration", "LlavaConfig", "CLIPVisionConfig", "LlamaConfig"),
        ("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", "SiglipVisionConfig", "GemmaConfig"),
    ],
)
def test_a_vocabulary_in_the_config_of_an_image_tower_is_no_text(model, config, tower, words):
    """As in the published configs, and in those that these classes make by themselves."""
    image = getattr(transformers, tower)(**HF, vocab_size=32000)
    config = getattr(transformers, config)(vision_config=image, text_config=getattr(transformers, words)(**WORDS))
    report = sd.swap_attention(getattr(transformers, model)(config))
    assert report.replaced == tuple(f"model.vision_tower.encoder.layers.{i}.self_attn" for i in (0, 1))


def zoe_depth():
    """Of BEiT with four stages, which it needs."""
    beit = transformers.BeitConfig(
        **HF | {"num_hidden_layers": 4},
        use_relative_position_bias=True,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = transformers.ZoeDepthConfig(
        backbone_config=beit, neck_hidden_sizes=[48] * 4, fusion_hidden_size=32, bottleneck_features=32
    )
    return transformers.ZoeDepthForDepthEstimation(config)


def test_zoe_depth():
    model, images = HostModel("ZoeDepth", zoe_depth, lambda *_: None, 1).make(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(images).predicted_depth
        report = sd.swap_attention(model, "none")
        assert report.replaced == tuple(f"backbone.beit.layers.{i}.attention" for i in range(4))
        assert not report.left
        assert torch.equal(model(images).predicted_depth, before)
        sd.restore_attention(model)
        sd.swap_attention(model, STRONG)
        assert model(images).predicted_depth.isfinite().all()
        assert not torch.equal(model(images).predicted_depth, before)


@pytest.mark.parametrize("name", ["EoMT", "EoMT with DINOv3"])
@pytest.mark.parametrize("training", [False, True])
def test_queries_come_in_front_in_the_last_blocks(name, training):
    """Of the block before, too: HOSTS look at the last one alone. And with LPE, which asks where the patches are."""
    host = BY_NAME[f"transformers {name}"]
    model, images = host.make().train(training), host.images((64, 64))
    original = host.make().train(training)
    sd.swap_attention(model, STRONG)
    for i, num_in_front in ((0, 5), (1, 9)):
        attn = model.layers[i].attention
        args, kwargs, (got, _) = seen_at(attn, lambda: model(images))
        x = args[0]
        assert x.shape[1] == num_in_front + 16
        masks = full_masks(attn.spatial_decay.decay.gate, x[:, num_in_front:], (4, 4))
        with InFloat64(torch.nn.functional.pad(masks, (num_in_front, 0, num_in_front, 0))):
            expected, _ = original.layers[i].attention(*args, **kwargs)
        assert relative_error(got.detach(), expected.detach()) < 2e-6
    sd.restore_attention(model)
    sd.swap_attention(model, "fixed", lpe_kernel_size=3)
    with torch.no_grad():
        assert model(images).last_hidden_state.shape == (2, 25, 48)


class OwnEomt(transformers.EomtForUniversalSegmentation):
    """With a loss of one's own, for instance."""


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_queries_from_the_first_block_on_or_never(num_blocks):
    config = transformers.EomtConfig(**HF, num_blocks=num_blocks, num_queries=4, num_register_tokens=4)
    model = OwnEomt(config).eval()
    sd.swap_attention(model, STRONG)
    seen = []
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with torch.no_grad(), contextlib.nullcontext() if num_blocks else pytest.raises(RuntimeError, match="48 channels"):
        model(torch.randn(1, 3, 64, 64))  # without queries transformers itself fails, behind the blocks
    assert seen == ([25, 25] if num_blocks else [21, 21])


def packed(name, places, patches):
    """Images of these patches with positions (B, L, 2), zeros where there is none."""
    is_patch = places[..., 0] > 0
    if name == "Pix2Struct":
        return {"flattened_patches": torch.cat([places, patches * is_patch[..., None]], -1)}
    return {
        "pixel_values": patches,
        "pixel_attention_mask": is_patch.long(),
        "spatial_shapes": places.amax(1),
    }


def places_of(height, width, length):
    """Rows and columns from 1, in raster order, and zeros behind."""
    places = torch.cartesian_prod(torch.arange(1, height + 1), torch.arange(1, width + 1))
    return torch.nn.functional.pad(places, (0, 0, 0, length - len(places)))


@pytest.mark.parametrize("name", ["SigLIP 2", "Pix2Struct"])
def test_packed_images_of_several_grids_are_as_alone(name):
    model = BY_NAME[f"transformers {name}"].make()
    sd.swap_attention(model, STRONG)
    grids, patches = ((2, 6), (5, 3), (4, 4)), torch.randn(3, 16, 768)
    with torch.no_grad():
        places = torch.stack([places_of(*grid, 16) for grid in grids])
        together = model(**packed(name, places, patches)).last_hidden_state
        for i, (height, width) in enumerate(grids):
            length = height * width
            alone = packed(name, places_of(height, width, length)[None], patches[i : i + 1, :length])
            assert relative_error(together[i, :length], model(**alone).last_hidden_state[0]) < 1e-5


def built(model, config, **options):
    package = importlib.import_module(f"transformers.models.{model.rpartition('.')[0]}")
    name = model.rpartition(".")[2]
    configuration = importlib.import_module(package.__name__.replace("modeling", "configuration"))
    return getattr(package, name)(getattr(configuration, config)(**options))


@pytest.mark.parametrize(
    ("model", "config", "options", "reason"),
    [
        (
            "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            "Qwen2_5_VLVisionConfig",
            {"depth": 2, "hidden_size": 48, "num_heads": 3, "intermediate_size": 96},
            "blocks.0-1.attn: Qwen2_5_VLVisionAttention attends over images that are packed one behind the other",
        ),
        (
            "sam.modeling_sam.SamVisionModel",
            "SamVisionConfig",
            {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 64, "window_size": 2},
            "SamVisionSdpaAttention is not known to attend over all tokens of one grid (window_size=2)",
        ),
        ("llama.modeling_llama.LlamaModel", "LlamaConfig", WORDS, "layers.0-1.self_attn: LlamaAttention is causal"),
    ],
)
def test_why_a_class_that_nobody_registered_is_left(model, config, options, reason):
    with pytest.raises(ValueError, match="found none") as info:
        sd.swap_attention(built(model, config, **options))
    assert reason in str(info.value)
