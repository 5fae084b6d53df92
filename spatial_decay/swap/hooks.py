"""The hooks that tell the Calls of a model what passes, and how they go away again."""

from collections.abc import Sequence
from functools import partial

from torch import nn

from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts.base import PatchEmbed, Removable
from spatial_decay.swap.hosts.table import hook_dropouts

__all__ = ["install_hooks", "remove_hooks"]

_KEPT = "spatial_decay_hooks"
"""Where a module keeps its hooks, the Calls of each and what undoes it, so that copies and pickles have their own."""


def install_hooks(model: nn.Module, embed: PatchEmbed, behind: Sequence[str], calls: Calls) -> None:
    """On a patch embedding, and on the smallest part of the model that has it and the named attention behind it."""
    _keep(embed.module, calls, embed.module.register_forward_hook(partial(calls.note, embed.read), with_kwargs=True))
    root = embed.name
    while root and not all(name.startswith(f"{root}.") for name in behind):
        root = root.rpartition(".")[0]
    part = model.get_submodule(root)
    _keep(part, calls, part.register_forward_pre_hook(calls.forget))
    for module, removable in hook_dropouts(part, calls):
        _keep(module, calls, removable)


def remove_hooks(model: nn.Module) -> bool:
    """Undo install_hooks in all of the model's modules, but for what a decay somewhere needs; whether there was any."""
    was_any = False
    for module in model.modules():
        hooks = vars(module).pop(_KEPT, [])
        for calls, removable in hooks:
            if not calls.users:
                removable.remove()
                was_any = True
        if needed := [hook for hook in hooks if hook[0].users]:
            vars(module)[_KEPT] = needed
    return was_any


def _keep(module: nn.Module, calls: Calls, removable: Removable) -> None:
    vars(module).setdefault(_KEPT, []).append((calls, removable))
