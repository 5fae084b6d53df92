"""What is wrong in a call of swap_attention, and what the error says to do; the report as a table."""

import diffusers
import peft
import pytest
import timm
import torch
from torch import nn

import spatial_decay as sd
from spatial_decay.decay import AxialDecay, GaussianDecay, ManhattanDecay, PathDecay
from spatial_decay.swap.report import shortened
from tests.swap.hosts import SMALL


def vit():
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, r"must be a list of numbers.*: got 3. For this one alone pass \[3\]"),
        ({"layers": "all"}, "got 'all'. Leave it out for all"),
        ({"layers": [0.5]}, r"such as \[0, -1\]: got \[0.5\]"),
        ({"layers": ["blocks.0.attn"]}, r"got \['blocks.0.attn'\]"),
        ({"layers": [True]}, r"got \[True\]"),
        ({"layers": 0.5}, "got 0.5"),
        ({"gate_rnk": 4}, "swap_attention has no option 'gate_rnk'. Did you mean 'gate_rank'?"),
        ({"alpha": 0.2}, r"It is an option of a kind: decay=sd.kinds.Full\(alpha=...\)"),
        (
            {"gate_bias": False},
            r"sd.kinds.Full\(gate_bias=...\) or sd.kinds.Squared\(gate_bias=...\) or sd.kinds.One",
        ),
        ({"gate_bias_int": 0.0}, r"It is an option of a kind: decay=sd.kinds.Full\(gate_bias_init=...\) or "),
        ({"colour": 1}, "Its options are backend, decay, gate_rank, layers, lpe_kernel_size, num_prefix_tokens"),
    ],
    ids=str,
)
def test_what_no_type_fits_is_said(options, message):
    model = vit()
    with pytest.raises(TypeError, match=message):
        sd.swap_attention(model, **options)
    assert type(model.blocks[0].attn) is timm.layers.Attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_rank": -1}, "gate_rank must be a whole number >= 0: got -1. Or leave it out"),
        ({"gate_rank": 2.5}, "gate_rank must be a whole number >= 0: got 2.5"),
        ({"lpe_kernel_size": True}, "lpe_kernel_size must be a whole number >= 0: got True"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens must be a whole number >= 0: got -1"),
        ({"patch_embed": ""}, r"must be the name of a module of the model: got ''\.$"),
        ({"patch_embed": "patch_embd"}, "got 'patch_embd'. Did you mean 'patch_embed'?"),
        ({"patch_embed": nn.Identity()}, "must be the name of a module of the model: got a Identity"),
    ],
    ids=str,
)
def test_what_no_value_fits_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        sd.swap_attention(vit(), **options)


def test_a_patch_embedding_that_gives_no_map():
    model = vit()
    sd.swap_attention(model, patch_embed="patch_embed")  # its convolution does
    with pytest.raises(ValueError, match=r"must give a map \(B, D, H, W\): got \(1, 16, 48\) of PatchEmbed"):
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("change", [sd.swap_attention, sd.restore_attention])
def test_a_pipeline_a_class_and_a_name_are_no_models(change):
    transformer = diffusers.DiTTransformer2DModel(
        num_embeds_ada_norm=10, num_attention_heads=3, attention_head_dim=16, num_layers=1, sample_size=8
    )
    pipeline = diffusers.DiTPipeline(transformer, nn.Identity(), diffusers.DDIMScheduler())
    with pytest.raises(
        TypeError, match="got a DiTPipeline, which holds transformer, vae. Pass .* such as .transformer"
    ):
        change(pipeline)
    with pytest.raises(TypeError, match="got the class VisionTransformer. Build a model of it first"):
        change(timm.models.VisionTransformer)
    with pytest.raises(TypeError, match="got a str"):
        change("vit_tiny_patch16_224")


@pytest.mark.parametrize("wrapped", [["qkv"], ["proj"], "all-linear"])
def test_with_adapters_of_lora(wrapped):
    """Also around the convolution of the patch embedding, which is called proj too."""
    model = peft.get_peft_model(vit(), peft.LoraConfig(target_modules=wrapped, r=2))
    report = sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.0))
    assert len(report.replaced) == 2
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    gate = model.base_model.model.blocks[0].attn.spatial_decay.decay.gate
    assert gate.weight.grad.any()
    sd.restore_attention(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_report_is_a_table():
    model = vit()
    report = sd.swap_attention(model, "full", layers=[0])
    assert str(report) == (
        "decay 'full' in 1 attention module, 147 new parameters\n"
        "attention      class      heads  new parameters  grid from\n"
        "blocks.0.attn  Attention      3             147  patch_embed.proj\n"
        "left as it was: blocks.1.attn, because it is not in layers\n"
        'next: train; the new weights have ".spatial_decay." in their names'
    )
    assert repr(report) == "SwapReport(kind='full', 1 replaced, 1 left, 147 new parameters)"
    assert report.num_parameters == sum(x.numel() for name, x in model.named_parameters() if ".spatial_decay." in name)
    sd.restore_attention(model)
    assert str(sd.swap_attention(model, "none")).endswith("next: nothing; the model does what it did")


def test_names_that_differ_in_numbers_are_one():
    names = [f"layers.{i}.blocks.{j}.attn" for i, depth in enumerate([2, 2, 3]) for j in range(depth)]
    assert shortened(names) == {"layers.0-1.blocks.0-1.attn": 4, "layers.2.blocks.0-2.attn": 3}
    assert shortened(["0.attn", "1.attn", "5.attn", "head.attn", "10.mlp"]) == {
        "0-1,5.attn": 3,
        "head.attn": 1,
        "10.mlp": 1,
    }
    assert shortened([""]) == {"": 1}


def test_reprs_fit_on_a_line():
    numbers, grid = -torch.rand(2, 3, 5), sd.Grid(2, 2, num_prefix_tokens=1)
    rows = PathDecay(numbers[..., :2], sd.Grid(1, 2))
    positions = sd.Positions.of_subset(torch.tensor([[0, 3]]), grid)
    decays = [
        ManhattanDecay(numbers, grid),
        PathDecay(numbers, positions),
        GaussianDecay(numbers, -numbers, -numbers, grid),
    ]
    decays += [AxialDecay(rows, PathDecay(numbers[..., :2], sd.Grid(2, 1)), sd.Grid(2, 2))]
    for value in (*decays, positions, grid, sd.swap_attention(vit())):
        assert len(repr(value)) <= 120
        assert "\n" not in repr(value)
        assert "tensor(" not in repr(value)
    assert repr(decays[0]) == (
        "ManhattanDecay(strength: float32 (2, 3, 5), a grid of 2 x 2 patches behind 1 prefix tokens)"
    )
    assert "causal=True" in repr(PathDecay(numbers, grid, causal=True))
