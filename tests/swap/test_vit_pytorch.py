"""vit-pytorch: class token or none, heads of any width, dropout, and models around its ViT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vit_pytorch import MAE, ViT
from vit_pytorch.distill import DistillableViT

import spatial_decay as sd
from tests.cases import relative_error
from tests.swap.hosts import STRONG, InFloat64, full_masks

SMALL = {"image_size": (64, 96), "patch_size": (16, 8), "num_classes": 10, "dim": 48, "depth": 2, "heads": 3}
SMALL |= {"mlp_dim": 96}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("pool", "num_prefix"), [("cls", 1), ("mean", 0)])
@pytest.mark.parametrize("named", [False, True])
def test_class_token_or_none_oblong_patches_and_heads_of_any_width(pool, num_prefix, named):
    model = ViT(**SMALL, pool=pool, dim_head=8).eval()
    plain = copy.deepcopy(model)
    sd.swap_attention(model, STRONG, patch_embed="to_patch_embedding" if named else None)
    attn, seen = model.transformer.layers[1][0], []
    attn.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(IMAGES)
        ((x, got),) = seen
        masks = full_masks(attn.spatial_decay.decay.gate, attn.norm(x)[:, num_prefix:], (4, 12))
        with InFloat64(F.pad(masks, (num_prefix, 0, num_prefix, 0))):
            expected = plain.transformer.layers[1][0](x)
    assert relative_error(got, expected) < 2e-6


def test_one_head_as_wide_as_the_tokens_has_no_projection():
    model = ViT(**SMALL | {"heads": 1}, dim_head=48)
    assert isinstance(model.transformer.layers[0][0].to_out, nn.Identity)
    sd.swap_attention(model, STRONG)
    assert model(IMAGES).shape == (2, 10)


def test_dropout_of_the_softmax_is_the_modules_own():
    model = ViT(**SMALL, dropout=1.0 - 1e-6).train()
    sd.swap_attention(model)
    attn = model.transformer.layers[0][0]
    attn.to_out = nn.Identity()
    x = torch.randn(2, 49, 48)
    model.to_patch_embedding(IMAGES)
    assert not attn(x).any()
    attn.eval()
    assert attn(x).any()


def test_what_is_around_it_is_known_with_it_or_refused():
    student = DistillableViT(**SMALL)
    sd.swap_attention(student, STRONG)
    assert student(IMAGES).shape == (2, 10)
    with pytest.raises(RuntimeError, match="if behind them num_suffix_tokens=1"):
        student(IMAGES, distill_token=torch.randn(1, 48))
    mae = MAE(encoder=ViT(**SMALL | {"depth": 1}), decoder_dim=48, decoder_depth=1)
    assert list(sd.swap_attention(mae, STRONG).replaced) == ["encoder.transformer.layers.0.0"]
    with pytest.raises(RuntimeError, match="no image has come through the patch embedding"):
        mae.encoder.transformer(torch.randn(2, 12, 48))  # as it does it, behind parts of the embedding


def test_other_attention_in_its_place_is_refused():
    model = ViT(**SMALL)

    class Own(type(model.transformer.layers[0][0])):
        """What it does is not known."""

    for layer in model.transformer.layers:
        layer[0] = Own(48)
    with pytest.raises(ValueError, match=r"layers.0-1.0: it is a .*Own \(needs the Attention of its own module\)"):
        sd.swap_attention(model)
