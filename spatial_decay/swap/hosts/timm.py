"""timm: its attention, NaFlex's packed images, and patch dropout; facebookresearch/DiT is made of its attention too."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from spatial_decay.layout import Grid, Positions
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts.base import Library, Removable
from spatial_decay.swap.hosts.register import register_attention
from spatial_decay.swap.stand_in import StandIn, named

__all__ = ["LIBRARY"]


class _Mask(StandIn):
    how_to_fuse = "timm.layers.set_fused_attn(True) before building the model"


def _dim(attn: Any) -> int:
    return int((attn.qkv if attn.qkv is not None else attn.q_proj).in_features)


def _reason_against(attn: Any) -> str:
    is_fused = getattr(attn, "fused_attn", True)
    return "" if is_fused else "it writes its softmax out (fused_attn is False; see timm.layers.set_fused_attn)"


for _name in (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.vision_transformer.Attention",  # until timm 1.0.20
    "timm.models.eva.EvaAttention",
):
    register_attention(
        _name,
        heads=lambda attn: attn.num_heads,
        width=_dim,
        channels=lambda attn: attn.proj.in_features,
        reason_against=_reason_against,
        stand_in=_Mask,
    )


def _read_naflex(
    _module: Any, args: Sequence[Any], kwargs: dict[str, Any], output: tuple[Tensor, Any], num_prefix_tokens: int
) -> tuple[Grid | Positions, Tensor]:
    """Of NaFlexEmbeds: coordinates came in, or a grid size comes out."""
    given = named(("patches", "patch_coord", "patch_valid"), args, kwargs)
    tokens, size = output
    if given.get("patch_coord") is None:
        height, width = size
        return Grid(height, width, num_prefix_tokens), tokens
    coordinates, valid = given["patch_coord"], given.get("patch_valid")
    return Positions.of_coordinates(coordinates, valid, num_prefix_tokens=num_prefix_tokens), tokens


class _SwitchedClass:
    """A module whose class is another one for the time being."""

    def __init__(self, module: nn.Module, cls: Any) -> None:
        self.module, self.original = module, type(module)
        module.__class__ = cls

    def remove(self) -> None:
        """Give it its own class back."""
        self.module.__class__ = self.original


def _hook_dropout(module: nn.Module, calls: Calls) -> Sequence[Removable]:
    """It does not say which patches it keeps; its sibling does, and draws the same random numbers in the same order."""
    sibling = importlib.import_module(type(module).__module__).PatchDropoutWithIndices
    return [_SwitchedClass(module, sibling), module.register_forward_hook(partial(_note_kept_and_leave_tokens, calls))]


def _hook_dropout_with_indices(module: nn.Module, calls: Calls) -> Sequence[Removable]:
    return [module.register_forward_hook(partial(_note_kept, calls))]


def _note_kept(calls: Calls, module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
    """Forward hook of PatchDropoutWithIndices; outside of training it keeps all, and there are no indices."""
    indices = output[1]
    if indices is None:
        return
    num_patches = args[0].shape[1] - module.num_prefix_tokens
    if calls.num_suffix_tokens and num_patches != calls.num_patches():
        raise RuntimeError(
            "patch dropout must choose among the patches alone, so that their positions are known: got "
            f"{num_patches} tokens behind the prefix for {calls.num_patches()} patches. Add the "
            "suffix tokens after the dropout."
        )
    calls.keep_only(indices)


def _note_kept_and_leave_tokens(
    calls: Calls, module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]
) -> Tensor:
    """The same where the model expects the tokens alone."""
    _note_kept(calls, module, args, output)
    return output[0]


LIBRARY = Library(
    patch_embeds={"timm.models.naflexvit.NaFlexEmbeds": _read_naflex},
    dropouts={
        "timm.layers.patch_dropout.PatchDropout": _hook_dropout,
        "timm.layers.patch_dropout.PatchDropoutWithIndices": _hook_dropout_with_indices,
    },
)
