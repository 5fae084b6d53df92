"""diffusers: the self-attention of DiT and PixArt. Its Attention serves for much else, which is refused by name."""

from typing import Any

from torch import Tensor
from typing_extensions import Self

from spatial_decay.swap.hosts.base import Library
from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.stand_in import StandIn

__all__ = ["LIBRARY"]


class _Mask(StandIn):
    """AttnProcessor2_0 asks a mask for its shape on the way, (B * N, 1, L), and sees it as (B, N, 1, L)."""

    how_to_fuse = "AttnProcessor2_0 without slicing"

    def __init__(self, attn: Any, tokens: Tensor, attn_mask: Tensor | None) -> None:
        if attn_mask is not None:  # as AttnProcessor2_0 does it
            batch_size, num_tokens = tokens.shape[:2]
            prepared = attn.prepare_attention_mask(attn_mask, num_tokens, batch_size)
            attn_mask = prepared.view(batch_size, attn.heads, -1, num_tokens)
        super().__init__(attn, tokens, attn_mask)

    @property
    def shape(self) -> tuple[int, int, int]:
        batch_size, num_tokens = self.tokens.shape[:2]
        return batch_size * self.attn.heads, 1, num_tokens

    def view(self, *shape: int) -> Self:  # noqa: ARG002  it has one shape
        return self


def _reason_against(attn: Any) -> str:
    if attn.is_cross_attention:
        return "it attends to other tokens than its own (cross-attention)"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "it attends over a map, not over patch tokens"
    if attn.added_kv_proj_dim is not None:
        return "it attends over image and text together (joint attention)"
    processor = type(attn.processor).__name__
    return "" if processor == "AttnProcessor2_0" else f"its processor is {processor} (needs AttnProcessor2_0)"


register_attention(
    "diffusers.models.attention_processor.Attention",
    heads=lambda attn: attn.heads,
    width=lambda attn: attn.to_q.in_features,
    channels=lambda attn: attn.to_v.out_features,
    mask="attention_mask",
    reason_against=_reason_against,
    num_prefix_tokens=lambda _: 0,
    stand_in=_Mask,
)

LIBRARY = Library()
