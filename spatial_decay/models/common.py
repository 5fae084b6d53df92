"""What all models share: their config, gradient checkpointing, and how linear layers begin."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Model", "check_whole", "init_linear", "run_block"]


class Model(nn.Module):
    """A model that is rebuilt from its arguments, whose blocks can be computed again in the backward pass.

    Attributes:
        config: The arguments, JSON values: the class called with them gives the same structure. See keeps_config.
        grad_checkpointing: See set_grad_checkpointing.
    """

    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the blocks' inputs and compute their insides again in the backward pass."""
        self.grad_checkpointing = enable

    def _note_in_config(self, **values: Any) -> None:
        """Change what config has of these; a subclass with arguments of its own has others."""
        self.config |= {name: value for name, value in values.items() if name in self.config}

    @property
    def _is_checkpointing(self) -> bool:
        return self.grad_checkpointing and self.training


def check_whole(least: int, **values: object) -> None:
    """Raise ValueError where an option, or one of a list's, is no whole number or less than the least."""
    for name, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(not isinstance(number, int) or isinstance(number, bool) or number < least for number in numbers):
            what = "be a whole number" if numbers is not value else "hold whole numbers"
            raise ValueError(f"{name} must {what} >= {least}: got {value!r}.")


def run_block(block: nn.Module, x: Tensor, *arguments: object, checkpointing: bool) -> Tensor:
    """block(x, *arguments); checkpointing: keep only these for the backward pass."""
    if not checkpointing:
        return block(x, *arguments)
    from torch.utils.checkpoint import checkpoint  # before torch 2.7 this pulls in sympy, 0.3 s

    return checkpoint(block, x, *arguments, use_reentrant=False)


@torch.no_grad()
def init_linear(module: nn.Module) -> None:
    """Linear layers as timm, DeiT and RMT begin; the decay's gates and the output gates start by themselves."""
    if isinstance(module, nn.Linear):
        module.weight.normal_(std=0.02)
        if module.bias is not None:
            module.bias.zero_()
