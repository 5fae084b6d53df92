"""open_clip: which tower takes a decay, whole models, patch dropout, towers of timm, and the older order of tokens."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout, Transformer
from torch import nn

import spatial_decay as sd
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.report import reasons
from tests.cases import relative_error
from tests.swap.hosts import STRONG, InFloat64, full_masks, open_clip_model, pickled, traces

IMAGE = ("visual.transformer.resblocks.0.attn", "visual.transformer.resblocks.1.attn")
IMAGES, TEXT = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)), torch.tensor([[1, 2, 98, 0]] * 2)
TEXT = F.pad(TEXT, (0, 4))


def coca():
    multimodal = {"context_length": 8, "width": 24, "heads": 2, "layers": 1}
    return open_clip.CoCa(
        24,
        vision_cfg=VISION | POOLED,
        text_cfg=multimodal | {"vocab_size": 99, "embed_cls": True, "output_tokens": True},
        multimodal_cfg=multimodal,
    )


VISION = {"image_size": (64, 96), "patch_size": 16, "width": 48, "head_width": 16, "layers": 2}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (open_clip_model, {"it attends over text": "transformer.resblocks.0-1.attn"}),
        (
            lambda: open_clip_model(open_clip.CustomTextCLIP),
            {"it attends over text": "text.transformer.resblocks.0-1.attn"},
        ),
        (
            lambda: open_clip_model(open_clip.CustomTextCLIP, {"qk_norm": True}, qk_norm=True),
            {"it attends over text": "text.transformer.resblocks.0-1.attn"},
        ),
        (
            coca,
            {
                "it attends over text": "text.transformer.resblocks.0.attn, text_decoder.resblocks.0.attn",
                "it attends to other tokens than its own (cross-attention)": "text_decoder.cross_attn.0.attn",
                "MultiheadAttention is not known to attend over all tokens of one grid": "visual.attn_pool.attn",
            },
        ),
    ],
    ids=["CLIP", "CustomTextCLIP", "custom blocks", "CoCa"],
)
def test_of_two_towers_that_of_the_images(build, left):
    report = sd.swap_attention(build(), STRONG)
    assert report.replaced == IMAGE
    assert {module.patch_embed for module in report.modules} == {"visual.conv1"}
    assert reasons(report.left) == left


@pytest.mark.parametrize("build", [open_clip_model, coca], ids=["CLIP", "CoCa"])
def test_the_whole_model_runs_and_its_weights_keep_their_names(build):
    model = build().eval()
    plain = copy.deepcopy(model)
    sd.swap_attention(model, STRONG)
    outputs, before = model(IMAGES, TEXT), plain(IMAGES, TEXT)
    outputs, before = (list(out.values()) if isinstance(out, dict) else out for out in (outputs, before))
    assert relative_error(outputs[0].detach(), before[0].detach()) > 1e-4
    assert torch.equal(outputs[1], before[1])  # text
    assert set(plain.state_dict()) < set(model.state_dict())
    other = build().eval()
    sd.swap_attention(other, STRONG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encode_image(IMAGES), model.encode_image(IMAGES))
    with pytest.raises(ValueError, match="have a save_pretrained: .*Save the state_dict of other models"):
        sd.save_swapped(model, "nowhere")
    outputs[0].sum().backward()
    assert model.visual.transformer.resblocks[0].attn.spatial_decay.decay.gate.weight.grad.any()


def test_text_is_refused_with_other_blocks_too():
    model = open_clip_model()
    blocks = Transformer(48, 2, 3, qk_norm=True).resblocks
    assert [type(block).__name__ for block in blocks] == ["CustomResidualAttentionBlock"] * 2
    model.transformer.resblocks = blocks
    assert sd.swap_attention(model).replaced == IMAGE


@pytest.mark.parametrize("vision", [{}, {"scale_heads": True}], ids=["usual", "custom"])
def test_masks_and_other_attention_in_their_place_are_refused(vision):
    model = open_clip_model(**vision)
    sd.swap_attention(model)
    attn, x = model.visual.transformer.resblocks[0].attn, torch.randn(1, 25, 48)
    given = (x,) if vision else (x, x, x)
    with pytest.raises(ValueError, match="masks|no mask"):
        attn(*given, attn_mask=torch.zeros(25, 25), **({} if vision else {"need_weights": False}))
    other = open_clip_model()
    other.visual.transformer.resblocks[0].attn = nn.MultiheadAttention(48, 3, add_zero_attn=True, batch_first=True)
    other.visual.transformer.resblocks[1].attn = nn.Linear(48, 48)
    with pytest.raises(ValueError, match=r"(?s)0.attn: its nn.Multi.* has kdim, .*1.attn: it is a torch.*Linear"):
        sd.swap_attention(other)
    with pytest.raises(ValueError, match=r"0-1.attn: it writes its softmax out \(scaled_cosine_attn\)"):
        sd.swap_attention(open_clip_model(scaled_cosine_attn=True))


def test_tokens_before_images_of_a_batch_are_the_same():
    """As open_clip had them before 2.25, and as its Transformer still can."""
    model = open_clip_model().eval()
    sd.swap_attention(model, STRONG, lpe_kernel_size=3)
    other = copy.deepcopy(model)
    sd.restore_attention(other)
    blocks = Transformer(48, 2, 3, batch_first=False)
    blocks.load_state_dict(other.visual.transformer.state_dict())
    other.visual.transformer = blocks
    assert not blocks.resblocks[0].attn.batch_first
    sd.swap_attention(other, STRONG, lpe_kernel_size=3)
    other.load_state_dict(model.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert relative_error(other.eval().encode_image(IMAGES), model.encode_image(IMAGES)) < 2e-6
    images = torch.cat([IMAGES, IMAGES[:1]])
    assert relative_error(other.encode_image(images), model.encode_image(images)) < 2e-6


def kept(num_patches, rate, seed, batch_size=2):
    """As open_clip's PatchDropout draws them."""
    torch.manual_seed(seed)
    return torch.randn(batch_size, num_patches).topk(int(num_patches * (1 - rate)), dim=-1).indices


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "copy", "pickle"])
def test_patch_dropout_keeps_the_positions(copied):
    model = open_clip_model(patch_dropout=0.5).train()
    plain, found = copy.deepcopy(model), traces(model)
    torch.manual_seed(5)
    expected = plain.encode_image(IMAGES)
    sd.swap_attention(model, "none")
    torch.manual_seed(5)
    assert torch.equal(model.encode_image(IMAGES), expected)
    sd.restore_attention(model)
    assert traces(model) == found
    sd.swap_attention(model, STRONG)
    model, numbers = copied(model), kept(24, 0.5, 5)
    attn, seen = model.visual.transformer.resblocks[0].attn, []
    attn.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0])))
    torch.manual_seed(5)
    model.encode_image(IMAGES)
    ((x, got),) = seen
    masks = F.pad(full_masks(attn.spatial_decay.decay.gate, x[:, 1:], (4, 6), numbers), (1, 0, 1, 0))
    with InFloat64(masks):
        expected = plain.visual.transformer.resblocks[0].attn(x, x, x, need_weights=False)[0]
    assert relative_error(got, expected) < 2e-6
    model.eval().encode_image(IMAGES)  # it keeps all


def test_patch_dropout_keeps_numbers_that_bfloat16_has_not(monkeypatch):
    model = open_clip_model(patch_dropout=0.5, image_size=(320, 320), layers=1).to(torch.bfloat16).train()
    sd.swap_attention(model)
    seen, keep_only = [], Calls.keep_only
    monkeypatch.setattr(Calls, "keep_only", lambda calls, numbers: seen.append(numbers) or keep_only(calls, numbers))
    images, numbers = torch.randn(2, 3, 320, 320, dtype=torch.bfloat16), kept(400, 0.5, 5)
    torch.manual_seed(5)
    assert model.encode_image(images).dtype == torch.bfloat16
    assert torch.equal(seen[0], numbers)


def test_patch_dropout_whose_positions_are_not_known_is_refused():
    model = open_clip_model().train()
    model.visual.patch_dropout = PatchDropout(0.5, exclude_first_token=False)
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match="patch dropout must keep one class token .*exclude_first_token=False"):
        model.encode_image(IMAGES)
    model.visual.patch_dropout.exclude_first_token = True
    model.encode_image(IMAGES)
    model.visual.patch_dropout.register_forward_pre_hook(lambda _, args: torch.cat([args[0], args[0][:, :1]], 1))
    sd.restore_attention(model)
    sd.swap_attention(model)
    with pytest.raises(RuntimeError, match="and 26 tokens for 24 patches"):
        model.encode_image(IMAGES)


def test_a_tower_of_timm():
    model = open_clip_model(
        timm_model_name="test_vit", image_size=160, timm_pool="", timm_proj="linear", layers=1, patch_dropout=0.5
    )
    plain, images = copy.deepcopy(model).eval(), torch.randn(1, 3, 160, 160)
    report = sd.swap_attention(model, "none")
    assert {name.rpartition("blocks.")[0] for name in report.replaced} == {"visual.trunk."}
    assert {module.patch_embed for module in report.modules} == {"visual.trunk.patch_embed.proj"}
    assert set(report.left.values()) == {"it attends over text"}
    assert torch.equal(model.eval().encode_image(images), plain.encode_image(images))
    sd.restore_attention(model)
    sd.swap_attention(model, STRONG)
    model.train().encode_image(images).sum().backward()
    assert not torch.allclose(model.eval().encode_image(images), plain.encode_image(images), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("vision", [{}, {"scale_heads": True}, {"patch_dropout": 0.5}], ids=str)
def test_the_image_tower_compiles(vision):
    torch._dynamo.reset()
    tower = open_clip_model(**vision).visual.train("patch_dropout" in vision)
    sd.swap_attention(tower, STRONG)
    torch.manual_seed(3)
    expected = tower(IMAGES)
    torch.manual_seed(3)
    got = torch.compile(tower, fullgraph=True, backend="aot_eager")(IMAGES)
    assert relative_error(got.detach(), expected.detach()) < 1e-5
