"""diffusers: DiT, PixArt, HunyuanDiT, Stable Diffusion 3, Flux. Its Attention serves for much else, refused by name."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from spatial_decay.layout import Positions
from spatial_decay.swap.hosts.base import Library
from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.stand_in import StandIn, named

__all__ = ["LIBRARY"]


class _Mask(StandIn):
    """AttnProcessor2_0 asks a mask for its shape on the way, (B * N, 1, L), and sees it as (B, N, 1, L)."""

    how_to_fuse = "AttnProcessor2_0 without slicing"

    def __init__(self, attn: Any, tokens: Tensor, attn_mask: Tensor | None, num_text_tokens: int = 0) -> None:
        if attn_mask is not None:  # as AttnProcessor2_0 does it
            batch_size, num_tokens = tokens.shape[:2]
            prepared = attn.prepare_attention_mask(attn_mask, num_tokens, batch_size)
            attn_mask = prepared.view(batch_size, attn.heads, -1, num_tokens)
        super().__init__(attn, tokens, attn_mask, num_text_tokens)

    @property
    def shape(self) -> tuple[int, int, int]:
        batch_size, num_tokens = self.tokens.shape[:2]
        return batch_size * self.attn.heads, 1, num_tokens

    def view(self, *shape: int) -> Self:  # noqa: ARG002  it has one shape
        return self


class _MaskOfFlux(StandIn):
    """Its dispatcher asks a mask for its ndim."""

    how_to_fuse = "FluxAttnProcessor and diffusers' attention backend 'native'"
    ndim = 4


_OTHER_ATTENTION = {
    "SanaLinearAttnProcessor2_0": "it is linear attention, without a softmax",
    "Lumina2AttnProcessor2_0": "its text and image come in one sequence, of another length for each prompt",
    "CogVideoXAttnProcessor2_0": "it attends over text and an image, or all frames of a video, at once",
}


def _reason_against_any(attn: Any, *processors: str) -> str:
    processor = type(attn.processor).__name__
    if processor in processors:
        return ""
    return _OTHER_ATTENTION.get(processor, f"its processor is {processor} (needs {' or '.join(processors)})")


def _reason_against(attn: Any) -> str:
    if type(attn.processor).__name__ in _OTHER_ATTENTION:
        return _reason_against_any(attn)
    if attn.is_cross_attention:
        return "it attends to other tokens than its own (cross-attention)"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "it attends over a map, not over patch tokens"
    if attn.added_kv_proj_dim is not None:
        return "it attends over image and text together, in blocks that are not known"
    return _reason_against_any(attn, "AttnProcessor2_0", "HunyuanAttnProcessor2_0")


def _register(cls: str, reason_against: Callable[[Any], str], **options: Any) -> None:
    register_attention(
        f"diffusers.models.{cls}",
        heads=lambda attn: attn.heads,
        width=lambda attn: attn.to_q.in_features,
        channels=lambda attn: attn.to_v.out_features,
        mask="attention_mask",
        reason_against=reason_against,
        num_prefix_tokens=lambda _: 0,
        **options,
    )


def _forward_joint(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """What JointAttnProcessor2_0 computes, whose softmax takes no mask; with the text before the image.

    Args:
        attn: The module.
        hidden_states: Image tokens, (B, L, D).
        encoder_hidden_states: Text tokens, (B, T, D); None: the image attends to itself.
        attention_mask: None.

    Returns:
        Image tokens (B, L, D); and text tokens (B, T, D), where there are some.

    Raises:
        ValueError: a mask; another processor.
    """
    if attention_mask is not None:
        raise ValueError(
            "joint attention takes no attention_mask, which JointAttnProcessor2_0 would leave out without a word: got "
            "one. Pass none."
        )
    if reason := _reason_against_joint(attn):
        raise ValueError(
            f"joint attention with decay must keep the processor that it was swapped with: {reason}. Set the processor "
            "again, or restore the model first: sd.restore_attention(model)."
        )
    parts = [_heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))]
    tokens, num_text_tokens = hidden_states, 0
    if encoder_hidden_states is not None:
        tokens, num_text_tokens = torch.cat([encoder_hidden_states, hidden_states], 1), encoder_hidden_states.shape[1]
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_added_q, attn.norm_added_k, None)
        parts = [_heads(attn, encoder_hidden_states, projections, norms), *parts]
    q, k, v = (torch.cat(of_parts, 2) for of_parts in zip(*parts, strict=True))
    out = attn.spatial_decay.attend_as_host(tokens, q, k, v, num_text_tokens=num_text_tokens)
    text, image = out.transpose(1, 2).flatten(2).tensor_split([num_text_tokens], 1)
    image = attn.to_out[1](attn.to_out[0](image))
    if encoder_hidden_states is None:
        return image
    return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, x: Tensor, projections: Sequence[nn.Module], norms: Sequence[nn.Module | None]) -> list[Tensor]:
    """Queries, keys and values of tokens (B, L, D), (B, N, L, d) each."""
    of_all = [project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in projections]
    return [x if norm is None else norm(x) for x, norm in zip(of_all, norms, strict=True)]


def _reason_against_joint(attn: Any) -> str:
    return _reason_against_any(attn, "JointAttnProcessor2_0")


def _reason_against_flux(attn: Any) -> str:
    return _reason_against_any(attn, "FluxAttnProcessor")


_register("attention_processor.Attention", _reason_against, stand_in=_Mask)
for _block in (
    "attention.JointTransformerBlock.attn",
    "attention.JointTransformerBlock.attn2",
    "transformers.transformer_sd3.SD3SingleTransformerBlock.attn",
):
    _register(_block, _reason_against_joint, forward=_forward_joint)
_register(
    "transformers.transformer_flux.FluxAttention",
    _reason_against_flux,
    text="encoder_hidden_states",
    stand_in=_MaskOfFlux,
)


def _read_flux(
    _module: Any, args: Sequence[Any], kwargs: dict[str, Any], _output: None, num_prefix_tokens: int
) -> tuple[Positions, Tensor]:
    """Of the model itself: row and column of each image token are given to it; the text is first in the sequence."""
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids")
    given = named(names, args[: len(names)], kwargs)
    ids, tokens = given["img_ids"], given["hidden_states"]
    ids = ids[0] if ids.ndim == 3 else ids  # as the model does it
    num_text_tokens = given["encoder_hidden_states"].shape[1]
    return Positions.of_coordinates(ids[None, :, 1:], num_prefix_tokens=num_prefix_tokens + num_text_tokens), tokens


_OVER_FRAMES = "it attends over all frames of a video at once"

LIBRARY = Library(
    inputs={"diffusers.models.transformers.transformer_flux.FluxTransformer2DModel": _read_flux},
    refused={
        "diffusers.models.transformers.transformer_wan.WanAttention": _OVER_FRAMES,
        "diffusers.models.transformers.transformer_ltx.LTXAttention": _OVER_FRAMES,
        "diffusers.models.attention_processor.MochiAttention": _OVER_FRAMES,
    },
)
