"""vit-pytorch: ViT and SimpleViT. Their attention writes its softmax out, and their patches are cut without a map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spatial_decay.layout import Grid
from spatial_decay.swap.hosts.base import Library, class_names
from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.stand_in import named

__all__ = ["LIBRARY"]

_VIT, _SIMPLE_VIT = "vit_pytorch.vit", "vit_pytorch.simple_vit"


def _forward(attn: Any, x: Tensor) -> Tensor:
    """What Attention computes. Its norm is a part of it: gates read what comes behind, as in other models."""
    x = attn.norm(x)  # (B, L, D)
    qkv = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1))  # (B, L, 3, N, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, N, L, d) each
    dropout_p = attn.dropout.p if attn.training and hasattr(attn, "dropout") else 0.0  # SimpleViT has none
    out = attn.spatial_decay.attend_as_host(x, q, k, v, dropout_p=dropout_p, scale=attn.scale)
    return attn.to_out(out.transpose(1, 2).flatten(2))


def _reason_against(attn: Any) -> str:
    of_class = class_names(attn)[0]
    is_own = of_class in (f"{_VIT}.Attention", f"{_SIMPLE_VIT}.Attention")
    return "" if is_own else f"it is a {of_class} (needs the Attention of its own module)"


for _model in (f"{_VIT}.ViT", f"{_SIMPLE_VIT}.SimpleViT"):
    register_attention(
        f"{_model}.transformer.layers.*.0",
        heads=lambda attn: attn.heads,
        width=lambda attn: attn.to_qkv.in_features,
        channels=lambda attn: attn.to_qkv.out_features // 3,
        forward=_forward,
        reason_against=_reason_against,
    )


def _read_patches(
    module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Tensor, num_prefix_tokens: int
) -> tuple[Grid, Tensor]:
    """Of a Sequential whose first part is einops' Rearrange, which cuts images (B, C, h * p1, w * p2)."""
    height, width = named(("input",), args, kwargs)["input"].shape[-2:]
    patch = module[0].axes_lengths
    return Grid(height // patch["p1"], width // patch["p2"], num_prefix_tokens), output


LIBRARY = Library(
    patch_embeds={
        f"{_VIT}.ViT.to_patch_embedding": _read_patches,
        f"{_SIMPLE_VIT}.SimpleViT.to_patch_embedding": _read_patches,
    },
    num_prefix_tokens={f"{_VIT}.ViT": lambda vit: len(vit.cls_token), f"{_SIMPLE_VIT}.SimpleViT": lambda _: 0},
)
