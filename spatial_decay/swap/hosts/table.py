"""The host libraries, none of which is imported; and what of them is in a model."""

import inspect
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts import diffusers, open_clip, timm, torchvision, transformers, vit_pytorch
from spatial_decay.swap.hosts.base import PatchEmbed, Removable, class_names, rows_of

__all__ = [
    "LIBRARIES",
    "hook_dropouts",
    "num_prefix_tokens_of",
    "patch_embed_of",
    "patch_embeds_of",
    "reason_of_unknown",
]

LIBRARIES = (
    timm.LIBRARY,
    transformers.LIBRARY,
    diffusers.LIBRARY,
    torchvision.LIBRARY,
    open_clip.LIBRARY,
    vit_pytorch.LIBRARY,
)
"""A new library adds its file, which registers its attention as it is imported, and its name here."""

_PATCH_EMBEDS = {name: read for library in LIBRARIES for name, read in library.patch_embeds.items()}
_INPUTS = {name: read for library in LIBRARIES for name, read in library.inputs.items()}
_REFUSED = {name: reason for library in LIBRARIES for name, reason in library.refused.items()}
_DROPOUTS = {name: hook for library in LIBRARIES for name, hook in library.dropouts.items()}
_INSERTIONS = {name: hook for library in LIBRARIES for name, hook in library.insertions.items()}
_NUM_PREFIX_TOKENS = {name: count for library in LIBRARIES for name, count in library.num_prefix_tokens.items()}

_Row = TypeVar("_Row")


def reason_of_unknown(module: nn.Module, parent: nn.Module | None) -> str:
    """Why attention of a class that is not registered is left alone; empty for what is no attention."""
    if not type(module).__name__.endswith(("Attention", "Attn", "AttentionPoolLatent", "AttentionPool2d")):
        return ""
    kind = type(module).__name__
    if reason := _row_of(module, _REFUSED):
        return reason
    if getattr(module, "is_causal", None) is True:
        return f"{kind} is causal"
    if "cu_seqlens" in inspect.signature(module.forward).parameters:
        return f"{kind} attends over images that are packed one behind the other"
    window = getattr(module, "window_size", None) or getattr(parent, "window_size", None)
    return f"{kind} is not known to attend over all tokens of one grid" + f" (window_size={window})" * bool(window)


def patch_embeds_of(model: nn.Module) -> list[PatchEmbed]:
    """All there are: modules known by name; without any, convolutions whose stride is their kernel."""
    found, modules = [], dict(model.named_modules())
    known = _known_embeds(modules)
    convolutions = dict[str, nn.Conv2d]()  # by the name of what PEFT has wrapped around one
    for name, module in modules.items():
        convolution = getattr(module, "base_layer", module)
        if isinstance(convolution, nn.Conv2d) and not any(name.startswith(f"{outer}.") for outer in convolutions):
            convolutions[name] = convolution
    for name, module in modules.items():
        above, _, leaf = name.rpartition(".")
        if name in known:
            found.append(known[name])
            continue
        is_of_embed = "Embed" in type(modules[above]).__name__ and leaf in ("proj", "projection")
        if name in convolutions and (is_of_embed or leaf in _USUAL_NAMES) and above not in known:
            found.append(PatchEmbed(name, module))
    if found:
        return found
    return [
        PatchEmbed(name, modules[name])
        for name, convolution in convolutions.items()
        if max(convolution.stride) > 1 and convolution.kernel_size == convolution.stride
    ]


def patch_embed_of(modules: Mapping[str, nn.Module], name: str) -> PatchEmbed:
    """The named module as a patch embedding."""
    return _known_embeds(modules).get(name) or PatchEmbed(name, modules[name])


def _known_embeds(modules: Mapping[str, nn.Module]) -> dict[str, PatchEmbed]:
    return {
        name: PatchEmbed(name, modules[name], read, is_input=is_input)
        for table, is_input in ((_PATCH_EMBEDS, False), (_INPUTS, True))
        for name, read in rows_of(table, modules).items()
    }


def num_prefix_tokens_of(module: nn.Module) -> int | None:
    """P, as a model or a part of one says it."""
    known: int | None = getattr(module, "num_prefix_tokens", None)
    count = _row_of(module, _NUM_PREFIX_TOKENS)
    return count(module) if known is None and count else known


def hook_dropouts(part: nn.Module, calls: Calls) -> Iterator[tuple[nn.Module, Removable]]:
    """Make what leaves tokens out, or puts some in front, say so; each with what undoes it."""
    for module in part.modules():
        if hook := _DROPOUTS.get(class_names(module)[0]) or _row_of(module, _INSERTIONS):
            for removable in hook(module, calls):
                yield module, removable


_USUAL_NAMES = ("patch_embed", "patch_embedding", "patch_embeddings")


def _row_of(module: nn.Module, table: Mapping[str, _Row]) -> _Row | None:
    return next((table[name] for name in class_names(module) if name in table), None)
