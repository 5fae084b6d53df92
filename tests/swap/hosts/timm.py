"""timm, and models of its layers."""

from typing import Any

import timm
import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn

from tests.swap.hosts.model import HostModel

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


class OwnDiT(nn.Module):
    """As facebookresearch/DiT: its own blocks around timm's PatchEmbed, Attention and Mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(None, 2, 4, 48, strict_img_size=False)
        self.blocks = nn.ModuleList(OwnDiTBlock() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x)
        return x


class OwnDiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attn, self.mlp = Attention(48, num_heads=3, qkv_bias=True), Mlp(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _timm(name: str, num_prefix_tokens: int, **options: Any) -> HostModel:
    sizes = options.pop("sizes", ((64, 64), (64, 96)))
    options = SMALL | {"num_classes": 10} | options
    return HostModel(
        f"timm {name}",
        lambda: timm.create_model(name, **options),
        lambda model, x: model(x),
        num_prefix_tokens,
        patch_size=options.get("patch_size", 16),
        sizes=sizes,
    )


HOSTS = [
    _timm("vit_tiny_patch16_224", 1, img_size=64, dynamic_img_size=True),
    _timm("deit_tiny_distilled_patch16_224", 2, img_size=64, sizes=((64, 64),)),
    _timm("vit_small_patch14_reg4_dinov2", 5, img_size=64, patch_size=16, dynamic_img_size=True),
    _timm("eva02_tiny_patch14_224", 1, img_size=64, patch_size=16, dynamic_img_size=True),
    _timm("vit_small_patch16_rope_224", 1, img_size=64, dynamic_img_size=True),
    _timm("vit_small_patch16_dinov3", 5, img_size=64, dynamic_img_size=True),
    _timm("naflexvit_base_patch16_gap", 4, reg_tokens=4),
    HostModel(
        "a DiT of timm's layers",
        OwnDiT,
        lambda model, x: model(x),
        0,
        channels=4,
        patch_size=2,
        sizes=((8, 8), (8, 12)),
        has_checkpointing=False,
    ),
]
