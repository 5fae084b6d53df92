"""What the backbones share."""

from torch import Tensor, nn

from spatial_decay.precision import check_like_weights

__all__ = ["check_images", "checkpoint_block", "init_linear"]


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
