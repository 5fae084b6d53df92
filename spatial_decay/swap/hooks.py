"""The hooks that tell the Calls of a model what passes, and how they go away again."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts.base import PatchEmbed, Removable
from spatial_decay.swap.hosts.table import hook_dropouts

__all__ = ["check_no_hooks_are_needed", "install_hooks", "remove_hooks"]

_KEPT = "spatial_decay_hooks"
"""Where a module keeps its hooks as _Kept, so that copies and pickles have their own."""


class _Kept:
    """A hook on a module.

    Args:
        calls: What it tells.
        removable: What undoes it.
        is_embed: Whether it is that of the patch embedding.
    """

    def __init__(self, calls: Calls, removable: Removable, *, is_embed: bool = False) -> None:
        self.__setstate__({"calls": calls, "removable": removable, "is_embed": is_embed})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.calls, self.removable, self.is_embed = state["calls"], state["removable"], state["is_embed"]
        if self.is_embed:
            self.calls.add_patch_embed()  # of a copy too


def install_hooks(model: nn.Module, embed: PatchEmbed, behind: Sequence[str], calls: Calls) -> None:
    """On a patch embedding, and on the smallest part of the model that has it and the named attention behind it."""
    register = embed.module.register_forward_pre_hook if embed.is_input else embed.module.register_forward_hook
    note = register(partial(calls.note, embed.read), with_kwargs=True)
    _keep(embed.module, _Kept(calls, note, is_embed=True))
    root = embed.name
    while root and not all(name.startswith(f"{root}.") for name in behind):
        root = root.rpartition(".")[0]
    part = model.get_submodule(root)
    _keep(part, _Kept(calls, part.register_forward_pre_hook(calls.enter, prepend=True, with_kwargs=True)))
    _keep(part, _Kept(calls, part.register_forward_hook(calls.leave, always_call=True)))
    for module, removable in hook_dropouts(part, calls):
        _keep(module, _Kept(calls, removable))


def check_no_hooks_are_needed(model: nn.Module) -> None:
    """Raise ValueError where a decay that is no part of the model needs hooks of an earlier swap."""
    for name, module in model.named_modules():
        if any(kept.calls.are_needed for kept in vars(module).get(_KEPT, [])):
            raise ValueError(
                f"the model must have no hooks of an earlier swap: {name or 'the root'!r} has some, which a copy of a "
                "part of it needs (copy.deepcopy of a block?). Restore the copy, restore_attention(copy), or delete it."
            )


def remove_hooks(model: nn.Module) -> bool:
    """Undo install_hooks in all of the model's modules, but for what a decay somewhere needs; whether there was any."""
    was_any = False
    for module in model.modules():
        hooks = vars(module).pop(_KEPT, [])
        for kept in hooks:
            if not kept.calls.are_needed:
                kept.removable.remove()
                was_any = True
        if needed := [kept for kept in hooks if kept.calls.are_needed]:
            vars(module)[_KEPT] = needed
    return was_any


def _keep(module: nn.Module, kept: _Kept) -> None:
    vars(module).setdefault(_KEPT, []).append(kept)
