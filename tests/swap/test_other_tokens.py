"""Tokens before and behind the patches in a swapped model, prompts and registers, and attention over time."""

import copy
import json

import diffusers
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.hosts import SMALL, STRONG, InFloat64, full_masks

VIT = SMALL | {"img_size": 64, "patch_size": 16, "num_classes": 10, "dynamic_img_size": True}
NUM_PROMPTS = 5
GIVEN = {"before": {"num_prefix_tokens": 1 + NUM_PROMPTS}, "behind": {"num_suffix_tokens": NUM_PROMPTS}}


class Prompted(VisionTransformer):
    """VPT-shallow: prompts between the class token and the patches; or registers behind the patches."""

    def __init__(self, where, **options):
        super().__init__(**VIT | options)
        self.where = where
        self.prompts = nn.Parameter(torch.randn(1, NUM_PROMPTS, 48))

    def _pos_embed(self, x):
        return with_prompts(super()._pos_embed(x), self.prompts, self.where, 1)


def with_prompts(x, prompts, where, num_prefix):
    prompts = prompts.expand(len(x), -1, -1)
    return torch.cat([x[:, :num_prefix], prompts, x[:, num_prefix:]] if where == "before" else [x, prompts], 1)


def prompted(where, **options):
    torch.manual_seed(0)
    model = Prompted(where, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def images(seed=0, size=(64, 96)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("where", GIVEN)
def test_the_advice_of_the_error_is_the_equation(where):
    model = prompted(where)
    original = copy.deepcopy(model)
    sd.swap_attention(model, STRONG)
    with pytest.raises(RuntimeError, match="5 more. If .* before .* num_prefix_tokens=6, if behind .*_suffix_tokens=5"):
        model(images())
    sd.restore_attention(model)
    sd.swap_attention(model, STRONG, **GIVEN[where])
    attn, seen = model.blocks[1].attn, []
    attn.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(images())
        ((x, got),) = seen
        start = 1 + NUM_PROMPTS if where == "before" else 1
        masks = full_masks(attn.spatial_decay.decay.gate, x[:, start : start + 24], (4, 6))
        around = (start, x.shape[1] - 24 - start) * 2
        with InFloat64(F.pad(masks, around)):
            expected = original.blocks[1].attn(x)
    assert relative_error(got, expected) < 2e-6
    options = attn.spatial_decay.options
    assert json.loads(json.dumps(options)) == options
    assert options["num_suffix_tokens"] == GIVEN[where].get("num_suffix_tokens")


def test_too_few_tokens_have_an_advice_too():
    model = prompted("behind", class_token=False, global_pool="avg")
    sd.swap_attention(model, STRONG, num_prefix_tokens=1, num_suffix_tokens=6)
    message = r"7 prefix tokens \(6 of them behind the patches in the model\).*2 fewer. Pass .*_prefix_tokens \(now 1\)"
    with pytest.raises(RuntimeError, match=message):
        model(images())
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    sd.swap_attention(model, STRONG, num_prefix_tokens=3)
    with pytest.raises(RuntimeError, match="2 fewer. If the model has so few before the patches .*_tokens=1"):
        model(images())


@pytest.mark.parametrize(
    "options",
    [
        {"decay": STRONG, "lpe_kernel_size": 3, "gate_rank": 4},
        {"decay": sd.kinds.OneDimensional(gate_bias_init=0.0)},
        {"decay": "fixed", "lpe_kernel_size": 3},
        {"decay": "gaussian", "gate_rank": 4},
        {"decay": "none", "lpe_kernel_size": 3},
    ],
    ids=lambda options: str(getattr(options["decay"], "name", options["decay"])),
)
@pytest.mark.parametrize("masked", [False, True])
def test_behind_is_as_before(options, masked):
    """Softmax does not care where tokens stand: the same weights with the same tokens elsewhere give the same."""
    before, behind = prompted("before"), prompted("behind")
    for model, where in ((before, "before"), (behind, "behind")):
        sd.swap_attention(model, **options, **GIVEN[where])
    with torch.no_grad():
        for weight in before.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    behind.load_state_dict(before.state_dict())
    order = torch.tensor([0, *range(6, 30), *range(1, 6)])  # of "behind", by number in "before"
    mask = torch.randn(2, 1, 30, 30) if masked else None
    with torch.no_grad():
        expected = before.forward_features(images(), attn_mask=mask)[:, order]
        for given in (mask, mask[:, :, :1] if masked else None):
            moved = given
            if masked:
                expected = before.forward_features(images(), attn_mask=given)[:, order]
                moved = given[..., order] if given.shape[2] == 1 else given[:, :, order][..., order]
            assert relative_error(behind.forward_features(images(), attn_mask=moved), expected) < 1e-5


def test_no_decay_with_tokens_behind_changes_nothing():
    model = prompted("behind")
    with torch.no_grad():
        before = model(images())
        sd.swap_attention(model, "none", num_suffix_tokens=NUM_PROMPTS)
        assert torch.equal(model(images()), before)


def test_packed_images_with_tokens_behind():
    class PromptedNaFlex(NaFlexVit):
        where = "before"

        def _forward_embeds(self, *args, **kwargs):
            out = super()._forward_embeds(*args, **kwargs)
            out["patches"] = with_prompts(out["patches"], torch.linspace(-1, 1, 240).view(1, 5, 48), self.where, 4)
            if out.get("attn_mask") is not None:
                mask = out["attn_mask"]
                keys = with_prompts(mask[:, 0, 0, :, None], mask.new_zeros(1, 5, 1), self.where, 4)[..., 0]
                out["attn_mask"] = keys[:, None, None]
            return out

    torch.manual_seed(0)
    config = NaFlexVitCfg(embed_dim=48, depth=2, num_heads=3, reg_tokens=4, class_token=False, global_pool="avg")
    model = PromptedNaFlex(config, num_classes=10).eval()
    patches, number = torch.randn(2, 24, 768), torch.arange(24)
    valid = torch.stack([number < 24, number < 12])
    packed = {"patch_coord": torch.stack([number // 6, number % 6], -1).expand(2, -1, -1), "patch_valid": valid}
    sd.swap_attention(model, STRONG, num_prefix_tokens=9)
    with torch.no_grad():
        expected = model.forward_features(patches, **packed)["patches"]
        gates = model.state_dict()
        sd.restore_attention(model)
        sd.swap_attention(model, STRONG, num_suffix_tokens=5)
        model.load_state_dict(gates)
        model.where = "behind"
        got = model.forward_features(patches, **packed)["patches"]
    there = valid[..., None]
    assert relative_error(got[:, 4:28] * there, expected[:, 9:] * there) < 1e-5


class Append(nn.Module):
    def __init__(self, prompts):
        super().__init__()
        self.prompts = prompts

    def forward(self, x):
        return with_prompts(x, self.prompts, "behind", 1)


def test_patch_dropout_with_tokens_behind():
    model = prompted("behind", patch_drop_rate=0.5).train()
    sd.swap_attention(model, STRONG, num_suffix_tokens=NUM_PROMPTS)
    with pytest.raises(RuntimeError, match="got 29 tokens behind the prefix for 24 patches. Add the suffix"):
        model(images())

    outputs = []
    for where in ("before", "behind"):
        model = prompted(where, patch_drop_rate=0.5).train()
        model._pos_embed = lambda x, model=model: VisionTransformer._pos_embed(model, x)
        if where == "before":
            model.norm_pre = nn.Identity()
            model.norm_pre.register_forward_hook(
                lambda _module, _args, x, model=model: with_prompts(x, model.prompts, "before", 1)
            )
        else:
            model.norm_pre = Append(model.prompts)
        torch.manual_seed(1)
        sd.swap_attention(model, STRONG, **GIVEN[where])
        torch.manual_seed(2)
        outputs.append(model(images()))
    assert relative_error(outputs[1].detach(), outputs[0].detach()) < 1e-5


@pytest.mark.parametrize("given", [-1, True, 2.0])
def test_what_is_no_number_of_tokens(given):
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    with pytest.raises(ValueError, match="num_suffix_tokens must be a whole number >= 0"):
        sd.swap_attention(model, num_suffix_tokens=given)
    with pytest.raises(ValueError, match="belong to no row or column"):
        sd.swap_attention(prompted("behind", class_token=False, global_pool="avg"), "decomposed", num_suffix_tokens=5)


class Video(nn.Module):
    """As TimeSformer, of timm's parts: attention over space, then over time."""

    def __init__(self, names, embed=None):
        super().__init__()
        self.embed = embed or timm.layers.PatchEmbed(None, 16, 3, 48, strict_img_size=False)
        self.names = names
        for name in names:
            self.add_module(name, timm.layers.Attention(48, 3))

    def forward(self, video):
        batch_size, num_frames = video.shape[:2]
        if isinstance(self.embed, nn.Conv3d):
            x = self.embed(video.transpose(1, 2)).permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        else:
            x = self.embed(video.flatten(0, 1))
        for name in self.names:
            x = x + self.get_submodule(name)(x)
            x = x.unflatten(0, (batch_size, num_frames)).transpose(1, 2).flatten(0, 1)
            num_frames = len(x) // batch_size
        return x


def test_attention_over_time_is_told_by_its_name():
    for name in ("temporal_attn", "spatiotemporal", "attn_temp", "time_attention", "motion_modules_0"):
        report = sd.swap_attention(Video(["attn", name]))
        assert report.left == {name: "it attends over time"}
        assert report.replaced == ("attn",)
    for name in ("attn_temperature", "timestep_attn", "frame_attn"):
        assert len(sd.swap_attention(Video(["attn", name])).replaced) == 2
    encoder = nn.ModuleDict({"time_series": timm.create_model("vit_tiny_patch16_224", **VIT)})  # has the patches too
    assert len(sd.swap_attention(encoder).replaced) == 2


@pytest.mark.parametrize("embed", [None, nn.Conv3d(3, 48, (1, 16, 16), (1, 16, 16))], ids=["2d", "3d"])
def test_attention_over_as_many_frames_as_patches_is_no_image(embed):
    torch.manual_seed(0)
    model, video = Video(["attn", "other"], embed).eval(), torch.randn(2, 24, 3, 64, 96)
    sd.swap_attention(model, STRONG, patch_embed="embed" if embed else None)
    with pytest.raises(RuntimeError, match="the video has 24 frames, as many as an image has tokens.*as layers"):
        model(video)
    with pytest.raises(RuntimeError, match="got L = 7 tokens, 17 fewer"):
        model(video[:, :7])
    sd.restore_attention(model)
    sd.swap_attention(model, STRONG, patch_embed="embed" if embed else None, layers=[0])
    with torch.no_grad():
        assert model(video).isfinite().all()


@pytest.mark.slow  # the import of its text encoders
def test_latte_with_as_many_frames_as_patches():
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=48,
        caption_channels=24,
        sample_size=4,
        patch_size=2,
        video_length=4,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=10,
    ).eval()
    given = {"timestep": torch.tensor([3]), "encoder_hidden_states": torch.randn(1, 5, 24)}
    video = torch.randn(1, 4, 4, 4, 4)  # 4 frames of 2 x 2 patches
    report = sd.swap_attention(model, STRONG)
    assert report.replaced == ("transformer_blocks.0.attn1",)
    assert report.left["temporal_transformer_blocks.0.attn1"] == "it attends over time"
    with torch.no_grad():
        assert model(video, **given).sample.isfinite().all()
