"""A model of somebody else's, what must be found in it, and its attention written out in float64."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from spatial_decay import kinds
from tests import references

STRONG = kinds.Full(gate_bias_init=0.0)  # no quiet start


@dataclass(frozen=True)
class HostModel:
    """A model, how it is called, and what swap_attention should find in it."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    num_prefix_tokens: int
    channels: int = 3
    patch_size: int = 16
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96))  # the first is what it is built for
    left: tuple[str, ...] = field(default=())
    num_suffix_tokens: int = 0
    is_copy: bool = False  # another row has the same code: what does not depend on the class is slow
    kept: Callable[[tuple[int, int]], torch.Tensor] | None = None  # numbers of the patches of a grid that go on, (B, K)
    has_checkpointing: bool = True
    text: dict[str, tuple[int, int]] = field(default_factory=dict)  # by module: text tokens before and behind its own
    prefix_of: dict[str, int] = field(default_factory=dict)  # by module, where num_prefix_tokens is another one
    has_norm: bool = False  # its attention begins with a norm, which the gates read behind

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        """With lively weights: layer scales, biases and tokens begin at 0 or near it."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        return model

    def images(self, size: tuple[int, int], batch_size: int = 2) -> torch.Tensor:
        torch.manual_seed(1)
        return torch.randn(batch_size, self.channels, *size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size, size[1] // self.patch_size


def traces(model: nn.Module) -> dict:
    """What a swap could leave on a model: classes, hooks, attributes and weights, by the names of its modules."""
    return {
        name: (
            type(module),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs),
            set(vars(module)),
            [own for own, _ in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class InFloat64(TorchFunctionMode):
    """Attention written out in float64, with these masks added to its own; it knows nothing of swap_attention."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.multi_head_attention_forward:  # of nn.MultiheadAttention, which would hide its softmax
            return func(*args, **kwargs | {"attn_mask": self.mask.flatten(0, 1).float()})
        if func is F.softmax:  # written out
            return torch.softmax(args[0].double() + self.mask, -1).to(torch.float32)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.double() for x in (*args, *(kwargs or {}).values())[:3])
        scale = (kwargs or {}).get("scale") or q.shape[-1] ** -0.5
        own = (kwargs or {}).get("attn_mask")  # BEiT's bias
        mask = self.mask if own is None else self.mask + own.double()
        return (torch.softmax(scale * q @ k.mT + mask, -1) @ v).to(torch.float32)


def full_masks(
    gate: nn.Module, patches: torch.Tensor, size: tuple[int, int], kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 4-9 as loops for patches (B, K, D), all of a grid or those kept, and a gate with a bias, (B, N, K, K)."""
    if kept is not None:  # the others add nothing to these
        whole = patches.new_zeros(len(patches), size[0] * size[1], patches.shape[-1])
        patches = whole.scatter(1, kept[..., None].expand_as(patches), patches)
    masks = []
    for image in patches.tolist():
        of_heads = []
        for weight, bias in zip(gate.weight.tolist(), gate.bias.tolist(), strict=True):
            logits = [sum(a * b for a, b in zip(token, weight, strict=True)) + bias for token in image]
            of_heads.append(references.full([references.log_sigmoid(z) for z in logits], *size))
        masks.append(of_heads)
    found = torch.tensor(masks, dtype=torch.float64)
    if kept is None:
        return found
    return torch.stack([mask[:, numbers][:, :, numbers] for mask, numbers in zip(found, kept, strict=True)])


def every_patch(grid: tuple[int, int]) -> torch.Tensor:
    """What goes on in models that are told positions and no grid, (2, K)."""
    return torch.arange(grid[0] * grid[1]).expand(2, -1)
