"""Small backbones for the dense examples, by names that timm knows, and the one way in which all models are trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import spatial_decay as sd
import spatial_decay.integrations.timm  # its models get their names
from dense_data import SIZE
from spatial_decay.models.sdt_h import SDTHOptions

WEIGHT_DECAY = 0.05

CHANNELS = (16, 32, 64, 64)  # of the maps
SMALL: SDTHOptions = {
    "embed_dims": CHANNELS,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 4),
    "mlp_ratios": 2,
    "drop_path_rate": 0.0,
    "projection_dim": 64,
}
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "mlp_ratio": 2}

NAMES = {"SDT-H": "mini_sdt_h", "RMT": "mini_rmt", "ViT, swapped": "mini_vit", "ViT": "mini_vit"}
"""Rows -> what timm.create_model takes."""

CONFIG: dict[str, Any] = {"SDT-H, RMT": SMALL, "ViT": VIT}
"""What results depend on besides."""


@register_model  # type: ignore[untyped-decorator]
def mini_sdt_h(**options: Any) -> nn.Module:
    return timm.create_model("sdt_h_tiny", **(SMALL | options))


@register_model  # type: ignore[untyped-decorator]
def mini_rmt(**options: Any) -> nn.Module:
    return timm.create_model("rmt_tiny", **(SMALL | options))


@register_model  # type: ignore[untyped-decorator]
def mini_vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **(VIT | options))


def is_vit(backbone: str) -> bool:
    """Whether all maps of this row have one stride."""
    return NAMES[backbone] == "mini_vit"


def swap(backbone: str, model: nn.Module) -> None:
    """Put decay into the ViT, if this row has any; as strong as in a new layer, since nothing is trained yet."""
    if backbone == "ViT, swapped":
        sd.swap_attention(model, sd.kinds.Full(gate_bias_init=0.0))


class SimplePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from the last one of a ViT of stride 8 (ViTDet, Li et al. 2022).

    Args:
        vit: Made with features_only; its last map is read.
        channels: Of the maps.
    """

    def __init__(self, vit: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.vit, self.channels = vit, list(channels)
        dim = VIT["embed_dim"]
        self.scales = nn.ModuleList(
            [
                nn.ConvTranspose2d(dim, channels[0], 2, 2),
                nn.Conv2d(dim, channels[1], 1),
                nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(dim, channels[2], 1)),
                nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(dim, channels[3], 1)),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, height, width) -> four maps (B, C, H, W)."""
        last = self.vit(images)[-1]
        return [scale(last) for scale in self.scales]


def maps(backbone: str) -> nn.Module:
    """A module that gives maps of strides 4, 8, 16 and 32, of CHANNELS."""
    model: nn.Module = timm.create_model(NAMES[backbone], features_only=True)
    if not is_vit(backbone):
        return model
    swap(backbone, model)
    return SimplePyramid(model, CHANNELS)


@dataclass(frozen=True)
class Recipe:
    """How much is trained; the same for all rows of a table."""

    images: int = 1500
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-3

    @property
    def steps(self) -> int:
        """Batches in all."""
        return self.epochs * -(-self.images // self.batch_size)


def train(
    model: nn.Module,
    loss_of: Callable[[Sequence[int]], Tensor],
    recipe: Recipe,
    *,
    seed: int,
    after_batch: Callable[[], object] = lambda: None,
) -> None:
    """AdamW, one cycle of the learning rate; the order depends on the seed alone.

    Args:
        model: All of it is trained.
        loss_of: The loss on images of these numbers.
        recipe: How.
        seed: Of the order.
        after_batch: Called after each.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = param_groups_weight_decay(model, WEIGHT_DECAY)  # of all but biases and norms
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    model.train()
    for _ in range(recipe.epochs):
        for batch in torch.randperm(recipe.images, generator=generator).split(recipe.batch_size):
            optimizer.zero_grad()
            loss_of(batch.tolist()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            after_batch()
    model.eval()
