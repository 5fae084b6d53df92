"""The host libraries, none of which is imported; and what of them is in a model."""

from collections.abc import Iterator, Mapping

from torch import nn

from spatial_decay.swap.calls import Calls
from spatial_decay.swap.hosts import diffusers, open_clip, timm, torchvision, transformers, vit_pytorch
from spatial_decay.swap.hosts.base import PatchEmbed, Removable, class_names, read_map, rows_of

__all__ = [
    "LIBRARIES",
    "hook_dropouts",
    "looks_like_attention",
    "num_prefix_tokens_of",
    "patch_embed_of",
    "patch_embeds_of",
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
_DROPOUTS = {name: hook for library in LIBRARIES for name, hook in library.dropouts.items()}
_NUM_PREFIX_TOKENS = {name: count for library in LIBRARIES for name, count in library.num_prefix_tokens.items()}


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a report should mention it where it is left alone."""
    return type(module).__name__.endswith(("Attention", "Attn", "AttentionPoolLatent", "AttentionPool2d"))


def patch_embeds_of(model: nn.Module) -> list[PatchEmbed]:
    """All there are: modules known by name; without any, convolutions whose stride is their kernel."""
    found, modules = [], dict(model.named_modules())
    rows = rows_of(_PATCH_EMBEDS, modules)
    convolutions = dict[str, nn.Conv2d]()  # by the name of what PEFT has wrapped around one
    for name, module in modules.items():
        convolution = getattr(module, "base_layer", module)
        if isinstance(convolution, nn.Conv2d) and not any(name.startswith(f"{outer}.") for outer in convolutions):
            convolutions[name] = convolution
    for name, module in modules.items():
        above, _, leaf = name.rpartition(".")
        if name in rows:
            found.append(PatchEmbed(name, module, rows[name]))
            continue
        is_of_embed = "Embed" in type(modules[above]).__name__ and leaf in ("proj", "projection")
        if name in convolutions and (is_of_embed or leaf in _USUAL_NAMES) and above not in rows:
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
    return PatchEmbed(name, modules[name], rows_of(_PATCH_EMBEDS, modules).get(name, read_map))


def num_prefix_tokens_of(module: nn.Module) -> int | None:
    """P, as a model or a part of one says it."""
    known: int | None = getattr(module, "num_prefix_tokens", None)
    counts = (_NUM_PREFIX_TOKENS[name] for name in class_names(module) if name in _NUM_PREFIX_TOKENS)
    return next((count(module) for count in counts), None) if known is None else known


def hook_dropouts(part: nn.Module, calls: Calls) -> Iterator[tuple[nn.Module, Removable]]:
    """Make what leaves tokens out say so, each with what undoes it."""
    for module in part.modules():
        if hook := _DROPOUTS.get(class_names(module)[0]):
            for removable in hook(module, calls):
                yield module, removable


_USUAL_NAMES = ("patch_embed", "patch_embedding", "patch_embeddings")
