"""What the backbones share."""

from collections.abc import Mapping

from torch import Tensor, nn

from spatial_decay.layers import AttentionOptions
from spatial_decay.precision import check_like_weights

__all__ = ["check_images", "check_options", "checkpoint_block", "init_linear"]


def check_options(model: str, options: Mapping[str, object], own: str = "") -> None:
    """Raise TypeError where options are no keywords of SpatialDecayAttention; own: what else there is, in words."""
    if unknown := set(options) - set(AttentionOptions.__annotations__):
        raise TypeError(
            f"{model} has no keyword {', '.join(sorted(unknown))}: {own}those for all blocks are "
            f"{', '.join(AttentionOptions.__annotations__)}."
        )


def checkpoint_block(block: nn.Module, x: Tensor, *arguments: object) -> Tensor:
    """Run a block, keeping only its inputs for the backward pass."""
    from torch.utils.checkpoint import checkpoint  # before torch 2.7 this pulls in sympy, 0.3 s

    return checkpoint(block, x, *arguments, use_reentrant=False)


def init_linear(module: nn.Module) -> None:
    """Linear layers as timm, DeiT and RMT begin; the decay's gates and the output gates start by themselves."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_images(x: Tensor, in_chans: int, weight: object, what: str = "images") -> None:
    """Floating point (B, in_chans, H, W), on the device and in the dtype of weight."""
    if not x.is_floating_point():
        raise TypeError(f"{what} must be floating point: got {x.dtype}. Convert them first, for instance x / 255.")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"{what} must be (B, {in_chans}, H, W): got shape {tuple(x.shape)}.")
    check_like_weights(what, x, weight)
