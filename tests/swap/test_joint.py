"""Joint attention of text and image, where the text lies nowhere; and attention of diffusers that stays refused."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from torch import nn

import spatial_decay as sd
from spatial_decay.swap.hosts.register import _HOSTS
from tests.cases import relative_error
from tests.swap.hosts import HOSTS, STRONG, InFloat64, full_masks

BY_NAME = {host.name: host for host in HOSTS}
SD3, FLUX = BY_NAME["diffusers Stable Diffusion 3"], BY_NAME["diffusers Flux"]


def prompt(num_tokens):
    return torch.randn(2, num_tokens, 24, generator=torch.Generator().manual_seed(num_tokens))


def test_a_prompt_of_another_length_each_call():
    model = SD3.make()
    original = copy.deepcopy(model)
    sd.swap_attention(model, STRONG)
    attn, other = model.transformer_blocks[0].attn, original.transformer_blocks[0].attn
    seen = []
    attn.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    for num_tokens in (3, 7, 1):
        with torch.no_grad():
            images, steps = SD3.images((8, 12)), torch.arange(2)
            model(images, prompt(num_tokens), prompt(1)[:, 0], steps)
            kwargs, (image, text) = seen.pop()
            masks = full_masks(attn.spatial_decay.decay.gate, kwargs["hidden_states"], (4, 6))
            with InFloat64(F.pad(masks, (0, num_tokens, 0, num_tokens))):
                expected_image, expected_text = other(**kwargs)
        assert text.shape[1] == num_tokens
        assert relative_error(image, expected_image) < 2e-6
        assert relative_error(text, expected_text) < 2e-6


@pytest.mark.parametrize("host", [SD3, FLUX], ids=str)
def test_kinds_that_need_rows_and_columns_are_refused(host):
    model = host.make()
    sd.swap_attention(model, "decomposed")
    with pytest.raises(ValueError, match="kind 'decomposed' needs .*Use another kind, (such as|for instance) 'full'"):
        host.run(model, host.images(host.sizes[0]))


@pytest.mark.parametrize("option", ["num_prefix_tokens", "num_suffix_tokens"])
@pytest.mark.parametrize("host", [SD3, FLUX], ids=str)
def test_text_is_not_counted_as_tokens_around_the_patches(host, option):
    model = host.make()
    sd.swap_attention(model, STRONG, **{option: 5})  # as many as the text has
    with pytest.raises(RuntimeError, match=f"the first 5 are text .* leave out .*{option} .now 5"):
        host.run(model, host.images(host.sizes[0]))


def test_a_processor_that_is_set_later_is_not_ignored():
    model = SD3.make()
    sd.swap_attention(model, STRONG)
    model.set_attn_processor(FusedJointAttnProcessor2_0())
    with pytest.raises(ValueError, match=r"its processor is FusedJointAttnProcessor2_0 \(needs Joint"):
        SD3.run(model, SD3.images((8, 8)))
    sd.restore_attention(model)
    with pytest.raises(ValueError, match="transformer_blocks.0-1.attn: its processor is Fused"):
        sd.swap_attention(model)


class Joint(nn.Module):
    """Joint attention of one's own, with the text first."""

    def __init__(self):
        super().__init__()
        self.qkv, self.of_text = nn.Linear(24, 72), nn.Linear(24, 72)

    def forward(self, x, text=None, mask=None):
        qkv = self.qkv(x) if text is None else torch.cat([self.of_text(text), self.qkv(x)], 1)
        q, k, v = qkv.unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)[:, 0 if text is None else text.shape[1] :]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.attn = nn.Conv2d(3, 24, 8, 8), Joint()

    def forward(self, images, text=None):
        return self.attn(self.patch_embed(images).flatten(2).mT, text)


@pytest.fixture
def own_table():
    known = dict(_HOSTS)
    yield
    _HOSTS.clear()
    _HOSTS.update(known)


def test_a_class_of_ones_own(own_table):
    answers = {"heads": lambda _: 2, "width": lambda _: 24, "mask": "mask"}
    for text in ("prompt", "mask", "x"):
        with pytest.raises(ValueError, match=f"text must be the name .*one of text: got '{text}'"):
            sd.swap.register_attention(Joint, **answers, text=text)
    with pytest.raises(ValueError, match="text is for a class whose own forward runs"):
        sd.swap.register_attention(Joint, **answers, text="text", forward=Joint.forward)
    sd.swap.register_attention(Joint, **answers, text="text")
    model, images = Model(), torch.randn(2, 3, 32, 24)
    original = copy.deepcopy(model)
    sd.swap_attention(model, STRONG, gate_rank=2)
    for text in (None, prompt(4)):
        x = model.patch_embed(images).flatten(2).mT
        masks = full_masks(model.attn.spatial_decay.decay.gate, x, (4, 3))
        before = 0 if text is None else 4
        with torch.no_grad(), InFloat64(F.pad(masks, (before, 0, before, 0))):
            expected = original(images, text) * model.attn.spatial_decay.output_gate(x)
        assert relative_error(model(images, text).detach(), expected) < 2e-6
    with pytest.raises(RuntimeError, match="16 more"):  # text that is no text of this call
        model.attn(torch.cat([x, x, x[:, :4]], 1))


def _small(name, **options):
    return getattr(diffusers, name)(**{"num_layers": 1, "num_attention_heads": 2} | options)


REFUSED = {
    "linear attention": lambda: _small(
        "SanaTransformer2DModel", attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=8,
    ),
    "of another length for each prompt": lambda: _small(
        "Lumina2Transformer2DModel", hidden_size=24, num_attention_heads=3, num_kv_heads=1, num_refiner_layers=1,
        cap_feat_dim=16, sample_size=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16),
    ),
    "text and an image, or all frames of a video": lambda: _small(
        "CogVideoXTransformer3DModel", attention_head_dim=16, text_embed_dim=16, sample_width=8, sample_height=8,
    ),
    "over all frames of a video": lambda: _small(
        "WanTransformer3DModel", attention_head_dim=12, text_dim=16, ffn_dim=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_stays_refused_says_why(reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        sd.swap_attention(REFUSED[reason]())
    assert str(refusal.value).count(reason) == 1  # of all its modules
