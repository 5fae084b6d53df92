"""open_clip: the image towers of CLIP and CoCa. Its text towers have the same blocks, so that paths tell them apart."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts import multihead_attention
from spatial_decay.swap.hosts.base import Library, Removable, class_names, read_map
from spatial_decay.swap.hosts.register import register_attention

__all__ = ["LIBRARY"]

_TRANSFORMER = "open_clip.transformer"


def _forward(attn: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of the usual block's nn.MultiheadAttention, or of the custom block's attention."""
    compute = multihead_attention.forward if isinstance(attn, nn.MultiheadAttention) else _forward_custom
    return compute(attn, x, *args, **kwargs)


def _forward_custom(attn: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """What open_clip.transformer.Attention computes, without scaled cosine."""
    if attn_mask is not None:
        raise ValueError(
            "attention with decay must get no mask, as open_clip's image towers give it none: got an attn_mask. Leave "
            "this module out, see layers of swap_attention."
        )
    q, k, v = multihead_attention.packed_qkv(attn, x)
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    out = attn.spatial_decay.attend_as_host(x, attn.ln_q(q), attn.ln_k(k), v, dropout_p=dropout_p)
    if attn.head_scale is not None:
        out = out * attn.head_scale
    out = attn.ln_inner(out.transpose(1, 2).flatten(2))  # (B, L, D)
    return attn.out_drop(attn.out_proj(out))


def _reason_against(attn: Any) -> str:
    if class_names(attn)[0] != f"{_TRANSFORMER}.Attention":
        return multihead_attention.reason_against(attn)
    return "it writes its softmax out (scaled_cosine_attn)" if attn.scaled_cosine else ""


def _register(path: str, reason_against: Callable[[Any], str]) -> None:
    register_attention(
        f"open_clip.{path}",
        heads=lambda attn: attn.num_heads,
        width=lambda attn: attn.out_proj.out_features,
        forward=_forward,
        reason_against=reason_against,
        num_prefix_tokens=lambda _: 1,
    )


_register("transformer.VisionTransformer.transformer.resblocks.*.attn", _reason_against)
for _path in (
    "model.CLIP.transformer.resblocks.*.attn",
    "transformer.TextTransformer.transformer.resblocks.*.attn",
    "transformer.MultimodalTransformer.resblocks.*.attn",
):
    _register(_path, lambda _: "it attends over text")
_register(
    "transformer.MultimodalTransformer.cross_attn.*.attn",
    lambda _: "it attends to other tokens than its own (cross-attention)",
)


def _hook_dropout(module: nn.Module, calls: Calls) -> Sequence[Removable]:
    """It does not say which patches it keeps, nor keeps their order: so each token takes its number with it."""
    return [
        module.register_forward_pre_hook(_add_numbers),
        module.register_forward_hook(partial(_note_numbers, calls), prepend=True),
    ]


def _add_numbers(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """As three last channels, its digits to the base 256, which bfloat16 has exactly."""
    if not module.training:
        return None
    (x,) = args
    numbers = torch.arange(x.shape[1], device=x.device)
    digits = torch.stack([numbers >> 16, (numbers >> 8) % 256, numbers % 256], -1).to(x.dtype)  # (L, 3)
    return (torch.cat([x, digits.expand(len(x), -1, -1)], -1),)  # (B, L, D + 3)


def _note_numbers(calls: Calls, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
    if not module.training:
        return None
    if not module.exclude_first_token or args[0].shape[1] != 1 + calls.num_patches():
        raise RuntimeError(
            "patch dropout must keep one class token and choose among the patches, so that their positions are known: "
            f"got exclude_first_token={module.exclude_first_token}, and {args[0].shape[1]} tokens for "
            f"{calls.num_patches()} patches. Set its prob to 0, or build the model without it."
        )
    high, middle, low = output[:, 1:, -3:].long().unbind(-1)  # (B, K) each
    calls.keep_only((high << 16) + (middle << 8) + low - 1)
    return output[..., :-3]


LIBRARY = Library(
    patch_embeds={f"{_TRANSFORMER}.VisionTransformer.conv1": read_map},
    dropouts={f"{_TRANSFORMER}.PatchDropout": _hook_dropout},
)
