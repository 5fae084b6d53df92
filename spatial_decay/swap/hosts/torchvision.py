"""torchvision: its VisionTransformer, whose attention is nn.MultiheadAttention."""

from typing import Any

from spatial_decay.swap.hosts import multihead_attention
from spatial_decay.swap.hosts.base import Library
from spatial_decay.swap.hosts.register import register_attention

__all__ = ["LIBRARY"]


def _reason_against(attn: Any) -> str:
    reason = multihead_attention.reason_against(attn)
    return reason if reason or attn.batch_first else "it has no batch_first, as torchvision builds it"


register_attention(
    "torchvision.models.vision_transformer.EncoderBlock.self_attention",
    heads=lambda attn: attn.num_heads,
    width=lambda attn: attn.embed_dim,
    forward=multihead_attention.forward,
    reason_against=_reason_against,
    num_prefix_tokens=lambda _: 1,
)

LIBRARY = Library()
