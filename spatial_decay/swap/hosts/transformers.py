"""transformers: ViT, DeiT, DINOv2 with and without registers, DINOv3."""

from collections.abc import Callable
from typing import Any

from spatial_decay.swap.hosts.base import Host, Library
from spatial_decay.swap.stand_in import StandIn

__all__ = ["LIBRARY"]


class _Mask(StandIn):
    how_to_fuse = "attn_implementation='sdpa', without output_attentions"


def _reason_against(attn: Any) -> str:
    chosen = attn.config._attn_implementation
    return "" if chosen == "sdpa" else f"it runs attn_implementation={chosen!r} (needs 'sdpa')"


def _host(num_prefix_tokens: Callable[[Any], int]) -> Host:
    return Host(
        num_heads=lambda attn: attn.config.num_attention_heads,
        dim=lambda attn: attn.q_proj.in_features,
        num_channels=lambda attn: attn.q_proj.out_features,
        mask_name="attention_mask",
        stand_in=_Mask,
        reason_against=_reason_against,
        num_prefix_tokens=num_prefix_tokens,
    )


def _class_and_registers(attn: Any) -> int:
    return 1 + int(attn.config.num_register_tokens)


LIBRARY = Library(
    attention={
        "transformers.models.vit.modeling_vit.ViTAttention": _host(lambda _: 1),
        "transformers.models.deit.modeling_deit.DeiTAttention": _host(lambda _: 2),
        "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _host(lambda _: 1),
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention": _host(
            _class_and_registers
        ),
        "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": _host(_class_and_registers),
    },
)
