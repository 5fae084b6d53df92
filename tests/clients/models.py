"""Small models for the clients: backbones of timm's registry, swapped ViTs, and what must hold of their outputs."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import TimmBackboneConfig

import spatial_decay as sd
import spatial_decay.integrations.timm

WIDTHS = {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]}


def backbone(num_classes: int = 5) -> nn.Module:
    """SDT-H by its name in timm."""
    return timm.create_model("sdt_h_tiny", num_classes=num_classes, **WIDTHS)


def vit() -> nn.Module:
    """A ViT of timm with decay in its attention."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    sd.swap_attention(model, sd.kinds.Full(gate_bias_init=1.0))
    return model


def timm_backbone(out_indices: tuple[int, ...] = (0, 1, 2, 3)) -> TimmBackboneConfig:
    """SDT-H as the models of transformers build it."""
    return TimmBackboneConfig(backbone="sdt_h_tiny", out_indices=list(out_indices), use_pretrained_backbone=False)


def images(batch_size: int = 2, size: int = 64) -> Tensor:
    """Of noise."""
    return torch.randn(batch_size, 3, size, size)


def check(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raise where an output is of another shape or not finite."""
    if tuple(out.shape) != shape or not out.isfinite().all():
        raise AssertionError(f"an output must be finite and {shape}: got {tuple(out.shape)}")


def check_gates(model: nn.Module, loss: Tensor | None = None) -> None:
    """Raise where the gates get no gradient, of this loss or of what ran before."""
    if loss is not None:
        loss.backward()
    gates: dict[str, Any] = {n: w.grad for n, w in model.named_parameters() if ".gate." in n and w.requires_grad}
    if not gates or not any(grad is not None and grad.any() for grad in gates.values()):
        raise AssertionError(f"gates must get a gradient: got none in any of {len(gates)}")
