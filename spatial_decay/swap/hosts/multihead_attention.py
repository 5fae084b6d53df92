"""PyTorch's nn.MultiheadAttention, which torchvision and open_clip call with the tokens three times."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["forward", "packed_qkv", "reason_against"]


def forward(
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
    """What it computes, which takes no stand-in for a mask: for self-attention without masks.

    Args:
        attn: An nn.MultiheadAttention with decay, with batch_first or without.
        query: Tokens, (B, L, D) with batch_first and (L, B, D) without.
        key: The same tensor.
        value: The same tensor.
        key_padding_mask: None.
        need_weights: False.
        attn_mask: None.
        average_attn_weights: Means nothing without weights.
        is_causal: False.

    Returns:
        Tokens, as query, and no weights.

    Raises:
        ValueError: it is called for anything else.
    """
    is_plain = query is key and key is value and not need_weights and not is_causal
    if not is_plain or attn_mask is not None or key_padding_mask is not None:
        raise ValueError(
            "nn.MultiheadAttention with decay must be called for self-attention without masks: with the same tensor "
            "three times and need_weights=False. Leave this module out, see layers of swap_attention."
        )
    tokens = query if attn.batch_first else query.transpose(0, 1)  # (B, L, D)
    dropout_p = attn.dropout if attn.training else 0.0
    out = attn.spatial_decay.attend_as_host(tokens, *packed_qkv(attn, tokens), dropout_p=dropout_p)
    out = attn.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)
    return out if attn.batch_first else out.transpose(0, 1), None


def packed_qkv(attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one weight for all three.

    Args:
        attn: Has num_heads, in_proj_weight and in_proj_bias.
        tokens: (B, L, D).

    Returns:
        q, k, v, (B, N, L, d) each.
    """
    qkv = F.linear(tokens, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def reason_against(attn: Any) -> str:
    """Why this module is not what forward computes; empty where it is."""
    cls = type(attn)
    if cls is not nn.MultiheadAttention:
        return f"it is a {cls.__module__}.{cls.__qualname__} (needs torch.nn.MultiheadAttention)"
    is_usual = attn._qkv_same_embed_dim and attn.bias_k is None and not attn.add_zero_attn
    return "" if is_usual else "its nn.MultiheadAttention has kdim, vdim, add_bias_kv or add_zero_attn"
