"""The attention modules and patch embeddings of other libraries, by name: none of them is imported here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Host", "PatchEmbed", "class_names", "host_of", "looks_like_attention", "patch_embeds_of"]


@dataclass(frozen=True)
class Host:
    """A class of attention modules that can take a decay.

    Args:
        num_heads: N of a module.
        dim: D, width of its tokens.
        num_channels: N * d, width of its values.
        mask_name: Keyword of forward that goes to F.scaled_dot_product_attention as attn_mask.
        reason_against: Why this one cannot; empty where it can.
        num_prefix_tokens: P of its model where the module knows; None where the model itself does.
    """

    num_heads: Callable[[Any], int]
    dim: Callable[[Any], int]
    num_channels: Callable[[Any], int]
    mask_name: str
    reason_against: Callable[[Any], str]
    num_prefix_tokens: Callable[[Any], int | None]


def host_of(module: nn.Module) -> Host | None:
    """The entry of the module's class or of one that it derives from."""
    for name in class_names(module):
        if name in _HOSTS:
            return _HOSTS[name]
    return None


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a report should mention it where it is left alone."""
    name = type(module).__name__
    return name.endswith(("Attention", "Attn", "SelfAttention", "AttentionPoolLatent", "AttentionPool2d"))


@dataclass(frozen=True)
class PatchEmbed:
    """A module that sees the grid of an image, and which hook of TokenLayout reads it."""

    name: str
    module: nn.Module
    hook: str
    with_kwargs: bool = False


def patch_embeds_of(model: nn.Module) -> list[PatchEmbed]:
    """All there are: modules known by name; without any, convolutions whose stride is their kernel."""
    found, modules = [], dict(model.named_modules())
    for name, module in modules.items():
        above, _, leaf = name.rpartition(".")
        parent = type(modules.get(above)).__name__
        if type(module).__name__ == "NaFlexEmbeds":
            found.append(PatchEmbed(name, module, "note_naflex", with_kwargs=True))
        is_named = ("Embed" in parent and leaf in ("proj", "projection")) or leaf in _PATCH_EMBEDS
        if isinstance(module, nn.Conv2d) and is_named and parent != "NaFlexEmbeds":
            found.append(PatchEmbed(name, module, "note_map"))
    if found:
        return found
    return [
        PatchEmbed(name, module, "note_map")
        for name, module in modules.items()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.kernel_size == module.stride
    ]


def class_names(module: nn.Module) -> list[str]:
    """Full names of the module's class and its bases."""
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


_PATCH_EMBEDS = ("patch_embed", "patch_embedding", "patch_embeddings")


def _fused_dim(attn: Any) -> int:
    return int((attn.qkv if attn.qkv is not None else attn.q_proj).in_features)


def _timm_reason(attn: Any) -> str:
    is_fused = getattr(attn, "fused_attn", True)
    return "" if is_fused else "it writes its softmax out (fused_attn is False; see timm.layers.set_fused_attn)"


_TIMM = Host(
    num_heads=lambda attn: attn.num_heads,
    dim=_fused_dim,
    num_channels=lambda attn: attn.proj.in_features,
    mask_name="attn_mask",
    reason_against=_timm_reason,
    num_prefix_tokens=lambda _: None,
)


def _hf_reason(attn: Any) -> str:
    chosen = attn.config._attn_implementation
    return "" if chosen == "sdpa" else f"it runs attn_implementation={chosen!r} (needs 'sdpa')"


def _hf_host(num_prefix_tokens: Callable[[Any], int]) -> Host:
    return Host(
        num_heads=lambda attn: attn.config.num_attention_heads,
        dim=lambda attn: attn.q_proj.in_features,
        num_channels=lambda attn: attn.q_proj.out_features,
        mask_name="attention_mask",
        reason_against=_hf_reason,
        num_prefix_tokens=num_prefix_tokens,
    )


def _diffusers_reason(attn: Any) -> str:
    if attn.is_cross_attention:
        return "it attends to other tokens than its own (cross-attention)"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "it attends over a map, not over patch tokens"
    if attn.added_kv_proj_dim is not None:
        return "it attends over image and text together (joint attention)"
    processor = type(attn.processor).__name__
    return "" if processor == "AttnProcessor2_0" else f"its processor is {processor} (needs AttnProcessor2_0)"


_HOSTS: dict[str, Host] = {
    "timm.layers.attention.Attention": _TIMM,
    "timm.layers.attention.AttentionRope": _TIMM,
    "timm.models.vision_transformer.Attention": _TIMM,  # until timm 1.0.20
    "timm.models.eva.EvaAttention": _TIMM,
    "transformers.models.vit.modeling_vit.ViTAttention": _hf_host(lambda _: 1),
    "transformers.models.deit.modeling_deit.DeiTAttention": _hf_host(lambda _: 2),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Attention": _hf_host(lambda _: 1),
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention": _hf_host(
        lambda attn: 1 + attn.config.num_register_tokens
    ),
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention": _hf_host(
        lambda attn: 1 + attn.config.num_register_tokens
    ),
    "diffusers.models.attention_processor.Attention": Host(
        num_heads=lambda attn: attn.heads,
        dim=lambda attn: attn.to_q.in_features,
        num_channels=lambda attn: attn.to_v.out_features,
        mask_name="attention_mask",
        reason_against=_diffusers_reason,
        num_prefix_tokens=lambda _: 0,
    ),
}
