"""torchvision: its VisionTransformer, whose attention is nn.MultiheadAttention, called with the tokens three times."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from spatial_decay.swap.hosts.base import Library
from spatial_decay.swap.hosts.register import register_attention

__all__ = ["LIBRARY"]


def _forward(
    attn: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention computes, which takes no stand-in for a mask: for self-attention without masks."""
    is_plain = query is key and key is value and not need_weights and not is_causal
    if not is_plain or attn_mask is not None or key_padding_mask is not None:
        raise ValueError(
            "nn.MultiheadAttention with decay must be called as torchvision's VisionTransformer does it: with the same "
            "tensor three times, need_weights=False and no masks. Leave this module out, see layers of swap_attention."
        )
    qkv = F.linear(query, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, L, d) each
    dropout_p = attn.dropout if attn.training else 0.0
    out = attn.spatial_decay.attend_as_host(query, q, k, v, dropout_p=dropout_p)
    return attn.out_proj(out.transpose(1, 2).flatten(2)), None


def _reason_against(attn: Any) -> str:
    if type(attn) is not nn.MultiheadAttention:
        return f"it is no nn.MultiheadAttention, but a {type(attn).__name__}"
    is_usual = attn.batch_first and attn._qkv_same_embed_dim and attn.bias_k is None and not attn.add_zero_attn
    return "" if is_usual else "it is not built as torchvision's VisionTransformer builds it"


register_attention(
    "torchvision.models.vision_transformer.EncoderBlock.self_attention",
    heads=lambda attn: attn.num_heads,
    width=lambda attn: attn.embed_dim,
    forward=_forward,
    reason_against=_reason_against,
    num_prefix_tokens=lambda _: 1,
)

LIBRARY = Library()
