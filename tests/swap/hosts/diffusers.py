"""diffusers, at one or two layers each; their prompts are embedded already."""

from typing import Any

import diffusers
import torch
from torch import nn

from tests.swap.hosts.model import HostModel, every_patch

_LATENTS: dict[str, Any] = {"channels": 4, "patch_size": 2, "sizes": ((8, 8), (8, 12))}
_DIFFUSERS: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
_JOINT = {"joint_attention_dim": 24, "pooled_projection_dim": 24}


def _dit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(len(x))
    return model(x, timestep=steps, class_labels=steps).sample


def _pixart(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    given = {"resolution": None, "aspect_ratio": None}
    return model(x, encoder_hidden_states=_text(x), timestep=torch.arange(len(x)), added_cond_kwargs=given).sample


def _text(x: torch.Tensor, num_tokens: int = 5, width: int = 24) -> torch.Tensor:
    return torch.linspace(-1, 1, len(x) * num_tokens * width).view(len(x), num_tokens, width)


def _hunyuan(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(
        x,
        timestep=torch.arange(len(x)).float(),
        encoder_hidden_states=_text(x, 5),
        text_embedding_mask=torch.ones(len(x), 5),
        encoder_hidden_states_t5=_text(x, 4),
        text_embedding_mask_t5=torch.ones(len(x), 4),
    ).sample


def _sd3(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    pooled, steps = _text(x, 1)[:, 0], torch.arange(len(x))
    return model(x, encoder_hidden_states=_text(x), pooled_projections=pooled, timestep=steps).sample


def _flux(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Its pipelines make tokens of 2 x 2 latents and number them, and so must whoever trains it."""
    h, w = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = x.unflatten(3, (w, 2)).unflatten(2, (h, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.cartesian_prod(*map(torch.arange, (1, h, w))).to(x.dtype)
    return model(
        tokens,
        encoder_hidden_states=_text(x),
        pooled_projections=_text(x, 1)[:, 0],
        timestep=torch.arange(len(x)) / 10,
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample


HOSTS = [
    HostModel(
        "diffusers DiT",
        lambda: diffusers.DiTTransformer2DModel(num_embeds_ada_norm=10, **_DIFFUSERS),
        _dit,
        0,
        **_LATENTS | {"sizes": ((8, 8), (12, 12))},  # it folds its output into a square
    ),
    HostModel(
        "diffusers PixArt",
        lambda: diffusers.PixArtTransformer2DModel(
            cross_attention_dim=48, caption_channels=24, out_channels=8, use_additional_conditions=False, **_DIFFUSERS
        ),
        _pixart,
        0,
        left=("transformer_blocks.0.attn2", "transformer_blocks.1.attn2"),
        **_LATENTS,
    ),
    HostModel(
        "diffusers HunyuanDiT",
        lambda: diffusers.HunyuanDiT2DModel(
            hidden_size=48,
            cross_attention_dim=24,
            cross_attention_dim_t5=24,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=4,
            use_style_cond_and_image_meta_size=False,
            **_DIFFUSERS,
        ),
        _hunyuan,
        0,
        left=("blocks.0.attn2", "blocks.1.attn2"),
        has_checkpointing=False,
        is_copy=True,
        **_LATENTS,
    ),
    HostModel(
        "diffusers Stable Diffusion 3",
        lambda: diffusers.SD3Transformer2DModel(**_DIFFUSERS, **_JOINT, caption_projection_dim=48),
        _sd3,
        0,
        text={"transformer_blocks.0.attn": (0, 5), "transformer_blocks.1.attn": (0, 5)},
        **_LATENTS,
    ),
    HostModel(
        "diffusers Stable Diffusion 3.5",  # its first blocks have a second attention, over the image alone
        lambda: diffusers.SD3Transformer2DModel(
            **_DIFFUSERS | {"num_layers": 1},
            **_JOINT,
            caption_projection_dim=48,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        _sd3,
        0,
        text={"transformer_blocks.0.attn": (0, 5)},
        **_LATENTS,
    ),
    HostModel(
        "diffusers Flux",  # its last blocks have text and image in one sequence
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=3,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            **_JOINT,
        ),
        _flux,
        0,
        text={"transformer_blocks.0.attn": (5, 0)},
        prefix_of={"single_transformer_blocks.0.attn": 5},
        kept=every_patch,
        **_LATENTS,
    ),
]
