"""transformers, at two layers each."""

from typing import Any

import torch
import transformers
from torch import nn

from tests.swap.hosts.model import HostModel, every_patch

HF = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
_RESIZED = {"interpolate_pos_encoding": True}
_BIASED = {"use_absolute_position_embeddings": True, "use_relative_position_bias": True}
_BIASED |= {"use_shared_relative_position_bias": True}


def _transformers(name: str, num_prefix_tokens: int, model: str, config: str, **options: Any) -> HostModel:
    run = options.pop("run", {})
    more = {
        key: options.pop(key)
        for key in ("left", "num_suffix_tokens", "is_copy", "sizes", "prefix_of", "has_checkpointing")
        if key in options
    }
    return HostModel(
        f"transformers {name}",
        lambda: getattr(transformers, model)(getattr(transformers, config)(**HF | options)),
        lambda host, x: host(x, **run).last_hidden_state,
        num_prefix_tokens,
        **more,
    )


def _noise(num_patches: int) -> torch.Tensor:
    """Of MAE, for two images: the patches with the least go on."""
    return (torch.arange(2 * num_patches).view(2, -1) * 0.618).frac()


def _kept(grid: tuple[int, int]) -> torch.Tensor:
    num_patches = grid[0] * grid[1]
    return _noise(num_patches).argsort(1)[:, : num_patches // 2]


def _mae(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    noise = _noise(x.shape[-2] * x.shape[-1] // 256)
    return model(x, noise=noise, interpolate_pos_encoding=True).last_hidden_state


def _packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of 16 x 16 of images, (B, L, 768), and the row and column of each, (L, 2)."""
    rows, columns = x.shape[-2] // 16, x.shape[-1] // 16
    patches = x.unflatten(3, (columns, 16)).unflatten(2, (rows, 16)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return patches, torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def _siglip2(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches, places = _packed(x)
    return model(
        patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long),
        spatial_shapes=(places[-1] + 1).expand(len(x), 2),
    ).last_hidden_state


def _pix2struct(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    patches, places = _packed(x)
    return model(torch.cat([(places + 1).expand(len(x), -1, -1), patches], -1)).last_hidden_state


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HF),
        text_config=transformers.LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, vocab_size=20
        ),
        image_token_index=7,
    )
    config.vision_feature_layer = -1  # else the last block is not read
    return transformers.LlavaForConditionalGeneration(config)


def _describe(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    words = torch.tensor([[1, *[7] * (x.shape[-2] * x.shape[-1] // 256), 2, 3]]).expand(len(x), -1)
    return model(input_ids=words, pixel_values=x).logits


HOSTS = [
    _transformers("ViT", 1, "ViTModel", "ViTConfig", run=_RESIZED),
    _transformers("DeiT", 2, "DeiTModel", "DeiTConfig", run=_RESIZED),
    _transformers("DINOv2", 1, "Dinov2Model", "Dinov2Config", mlp_ratio=2),
    _transformers(
        "DINOv2 with registers", 5, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4
    ),
    _transformers("DINOv3", 5, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=4),
    _transformers("CLIP", 1, "CLIPVisionModel", "CLIPVisionConfig", run=_RESIZED),
    _transformers(
        "SigLIP", 0, "SiglipVisionModel", "SiglipVisionConfig", is_copy=True, run=_RESIZED, left=("head.attention",)
    ),
    HostModel(
        "transformers ViTMAE",
        lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF, mask_ratio=0.5)),
        _mae,
        1,
        kept=_kept,
    ),
    _transformers("BEiT", 1, "BeitModel", "BeitConfig", **_BIASED),
    _transformers("Data2VecVision", 1, "Data2VecVisionModel", "Data2VecVisionConfig", **_BIASED),
    _transformers("DPT", 1, "DPTModel", "DPTConfig", is_copy=True),
    _transformers(
        "YOLOS",
        1,
        "YolosModel",
        "YolosConfig",
        num_suffix_tokens=4,
        num_detection_tokens=4,
        image_size=[64, 64],
    ),
    _transformers("ViTMSN", 1, "ViTMSNModel", "ViTMSNConfig", is_copy=True, run=_RESIZED),
    _transformers("I-JEPA", 0, "IJepaModel", "IJepaConfig", is_copy=True, run=_RESIZED),
    HostModel(
        "transformers SigLIP 2",
        lambda: transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**{key: HF[key] for key in HF if key != "image_size"}, num_patches=16)
        ),
        _siglip2,
        0,
        left=("head.attention",),
        kept=every_patch,
    ),
    HostModel(
        "transformers Pix2Struct",
        lambda: transformers.Pix2StructVisionModel(
            transformers.Pix2StructVisionConfig(
                hidden_size=48,
                d_kv=16,
                d_ff=96,
                num_hidden_layers=2,
                num_attention_heads=3,
                patch_embed_hidden_size=768,
                seq_len=32,
            )
        ),
        _pix2struct,
        0,
        kept=every_patch,
    ),
    *(
        _transformers(
            name,
            5,
            f"{cls}ForUniversalSegmentation",
            f"{cls}Config",
            num_blocks=1,
            num_queries=4,
            prefix_of={"layers.1.attention": 4 + 5},  # the queries come in before it
            has_checkpointing=False,
            num_register_tokens=4,
            sizes=((64, 64),),  # it takes no other
        )
        for name, cls in (("EoMT", "Eomt"), ("EoMT with DINOv3", "EomtDinov3"))
    ),
    HostModel(
        "transformers LLaVA",
        _llava,
        _describe,
        1,
        sizes=((64, 64),),  # it takes no other
        left=("model.language_model.layers.0.self_attn",),
        is_copy=True,
    ),
]
