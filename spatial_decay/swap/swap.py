"""Spatial decay for the ViT or DiT that someone already has: its attention modules, changed in place, and back."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from typing_extensions import Never

from spatial_decay.layers.kinds import DecayLike, as_kind
from spatial_decay.ops import Backend
from spatial_decay.ops.choice import check_backend
from spatial_decay.swap.calls import Calls
from spatial_decay.swap.decayed import AddedDecay, added_decays, parameters_of_forward, put_back, take_out
from spatial_decay.swap.hooks import check_no_hooks_are_needed, install_hooks, remove_hooks
from spatial_decay.swap.hosts.base import Host, PatchEmbed
from spatial_decay.swap.hosts.register import hosts_of
from spatial_decay.swap.hosts.table import num_prefix_tokens_of, patch_embed_of, patch_embeds_of, reason_of_unknown
from spatial_decay.swap.options import (
    check_is_model,
    check_is_whole,
    check_known,
    check_whole_number,
    checked_layers,
    did_you_mean,
    keywords_of,
    wrapped_part,
)
from spatial_decay.swap.report import SwappedModule, SwapReport, reasons

__all__ = ["able_to_swap", "restore_attention", "swap_attention"]


def swap_attention(
    model: nn.Module,
    decay: DecayLike = "full",
    *,
    lpe_kernel_size: int = 0,
    gate_rank: int = 0,
    layers: Sequence[int] | None = None,
    num_prefix_tokens: int | None = None,
    num_suffix_tokens: int | None = None,
    patch_embed: str | None = None,
    backend: Backend = "auto",
    **unknown: Never,
) -> SwapReport:
    """Put spatial decay into the attention of a model, in place. Kinds with gates change its outputs little at first.

    softmax(Q K^T / sqrt(d) + M_decay) V in place of softmax(Q K^T / sqrt(d)) V          (Mao et al. 2025, Eq. 10, 13)

    For timm (VisionTransformer, Eva, rope-ViT, DINOv3, NaFlexVit), transformers (ViT and its copies, DINOv2, DINOv3,
    the image towers of CLIP, SigLIP and SigLIP 2, BEiT, Data2VecVision, ViTMAE, DPT, YOLOS, EoMT, Pix2Struct),
    diffusers (DiTTransformer2DModel, the self-attention of PixArt and HunyuanDiT, Stable Diffusion 3, Flux),
    torchvision's VisionTransformer, the image towers of open_clip's CLIP and CoCa, vit-pytorch's ViT and SimpleViT, and
    other models that are made of their attention modules, such as facebookresearch/DiT; for a class of your own see
    register_attention. Each module keeps its weights and their names, its class as a base class, and its own forward,
    in which F.scaled_dot_product_attention gets the decay; new is its submodule `spatial_decay`. The grid of a call is
    read from what the patch embedding gives for its images, of any size. Text that joins the image in one softmax lies
    nowhere.

    Args:
        model: Changed in place. Swap before torch.compile, before it is wrapped or split for several processes, and
            before making the optimizer.
        decay: Kind of decay, see SpatialDecayMask: a name, a value such as kinds.Full(gate_bias_init=0.0), which starts
            with a strong one, or a mapping. Options that are left out are those of a quiet start, with next to no
            decay: gates have a trained bias that begins at 6 for `full`, at 7 for `squared`, and at 9 for the kinds
            that add up along a path; the rates of `learned` begin as weak. The fixed kinds, `alibi` and `gaussian` have
            no quiet start.
        lpe_kernel_size: Add an LPE, see SpatialDecayAttention; it starts at random.
        gate_rank: Add an output gate, see SpatialDecayAttention; it starts near one.
        layers: Which of the attention modules that can take a decay, by number in the order of the model, negative
            from the end. None: all.
        num_prefix_tokens: P, class and register tokens, first in the sequence. None: what the model says, or none.
        num_suffix_tokens: S, prompts, registers or text, last in the sequence. They have no position either. None: what
            the model says (the detection tokens of YOLOS), or none.
        patch_embed: Name of the module whose output (B, D, H, W) has the grid, where it is not found by itself.
        backend: As in decay_attention; for kind `none` only "auto", it keeps the model's own softmax.
        unknown: No more: what is misspelt is an error that says what was meant.

    Returns:
        What was replaced, and what was left and why; print it.

    Raises:
        TypeError, ValueError: nothing could be replaced; an option that cannot be, or that the kind has not; the model
            has been swapped already. The model is as it was.

    Examples:
        >>> import timm
        >>> model = timm.create_model("vit_small_patch16_224", num_classes=10)
        >>> report = swap_attention(model, "full")
        >>> len(report.replaced)
        12
    """
    check_is_model(model)
    check_known(unknown, keywords_of(swap_attention))
    check_backend(backend)
    layers = checked_layers(layers)
    kind = as_kind(decay)
    kind = kind.resolved(**kind.quiet)
    if kind.name == "none" and backend != "auto":
        raise ValueError(
            f"kind 'none' keeps the model's own softmax, so that backend must be 'auto': got {backend!r}. Leave it out."
        )
    for option, number in {
        "num_prefix_tokens": num_prefix_tokens,
        "num_suffix_tokens": num_suffix_tokens,
        "lpe_kernel_size": lpe_kernel_size,
        "gate_rank": gate_rank,
    }.items():
        check_whole_number(option, number)
    _check_not_wrapped(model)
    check_is_whole(model, "swapped")
    if added_decays(model):
        raise ValueError("the model's attention has been swapped already. Undo it first: restore_attention(model).")
    check_no_hooks_are_needed(model)
    able, left = _sorted_out(model, patch_embed)
    chosen = _chosen(list(able), layers)
    left |= {name: "it is not in layers" for name in able if name not in chosen}
    if not chosen:
        raise ValueError(
            "the model must have an attention module that can take a decay: found none"
            + "".join(f"\n  {names or 'the model'}: {reason}" for reason, names in reasons(left).items())
            + "\nFor attention of your own: teach swap_attention its class (sd.swap.register_attention), or add "
            "SpatialDecayMask or decay_attention to its code."
        )
    options: dict[str, Any] = {
        "decay": kind.config,
        "lpe_kernel_size": lpe_kernel_size,
        "gate_rank": gate_rank,
        "layers": layers,
        "num_prefix_tokens": num_prefix_tokens,
        "num_suffix_tokens": num_suffix_tokens,
        "patch_embed": patch_embed,
        "backend": backend,
    }
    is_over_space = layers is not None or _OVER_TIME in left.values()  # the user says it, or the model's names
    modules, calls_of, added = dict(model.named_modules()), dict[str, Calls](), dict[str, AddedDecay]()
    for name in chosen:
        host, embed = able[name]
        around = (
            _num_prefix_tokens(model, name, host, num_prefix_tokens),
            (host.num_suffix_tokens(modules[name]) or 0) if num_suffix_tokens is None else num_suffix_tokens,
        )
        calls = calls_of.setdefault(embed.name, Calls(*around))
        before = (calls.num_prefix_tokens, calls.num_suffix_tokens)
        if before != around:
            raise ValueError(
                "attention behind one patch embedding must agree on its prefix and suffix tokens: got "
                f"{around[0]} and {around[1]} in {name}, and {before[0]} and {before[1]} before it. Pass "
                "num_prefix_tokens and num_suffix_tokens."
            )
        added[name] = AddedDecay(
            modules[name],
            host,
            calls,
            decay=kind,
            lpe_kernel_size=lpe_kernel_size,
            gate_rank=gate_rank,
            backend=backend,
            is_over_space=is_over_space,
            options=options,
        )
    # Nothing has been changed so far, and nothing from here on can fail.
    for name, new in added.items():
        weights = list(modules[name].parameters())  # some are quantized, and those of torch.ao are none at all
        floating = [weight.dtype for weight in weights if weight.is_floating_point()]
        # On the meta device ours may be real: accelerate's init_empty_weights leaves them so.
        devices = [weight.device for weight in (*weights, *model.parameters()) if not weight.is_meta]
        new.to(device=devices[0] if devices else None, dtype=floating[0] if floating else None)
        new.train(modules[name].training)
    remove_hooks(model)  # of decays that were restored part by part
    put_back(model, added)
    for embed in {able[name][1].name: able[name][1] for name in chosen}.values():
        behind = [name for name in chosen if able[name][1].name == embed.name]
        install_hooks(model, embed, behind, calls_of[embed.name])
    modules_swapped = [
        SwappedModule(
            name,
            new.of_class,
            new.decay.num_heads,
            sum(weight.numel() for weight in new.parameters()),
            able[name][1].name,
        )
        for name, new in added.items()
    ]
    return SwapReport(kind, tuple(modules_swapped), left)


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo swap_attention: the model as it was, without the gates.

    Args:
        model: The model, or a part of it, such as a block; then the decay of the other parts stays, and the hooks that
            it needs. Once the last part is restored, this takes the hooks of the whole model away too. Those stay that
            a copy of a part needs (copy.deepcopy of a block), as long as it lives or until it is restored.

    Returns:
        Names of the attention modules that had a decay; none where hooks alone were left.

    Raises:
        ValueError: the model has no attention with decay, and no hooks; or it is split over processes.
    """
    check_is_model(model)
    check_is_whole(model, "restored")
    taken = take_out(model)
    for added in taken.values():
        for part in added.modules():  # PEFT keeps it and copies of it in a module of its own
            if isinstance(part, AddedDecay):
                part.calls.remove_user(part)
    if not remove_hooks(model) and not taken:
        raise ValueError("the model must have been changed by swap_attention: it has no attention with decay.")
    return tuple(taken)


def able_to_swap(model: nn.Module, patch_embed: str | None, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the attention modules that can take a decay, which `layers` counts; and of these those in layers."""
    return _chosen(list(_sorted_out(model, patch_embed)[0]), layers)


def _sorted_out(model: nn.Module, patch_embed: str | None) -> tuple[dict[str, tuple[Host, PatchEmbed]], dict[str, str]]:
    """Attention modules that can take a decay, with the patch embedding before each; and why the others cannot."""
    able, left, embeds = dict[str, tuple[Host, PatchEmbed]](), dict[str, str](), _patch_embeds(model, patch_embed)
    inside: list[str] = []
    modules = dict(model.named_modules())
    hosts = hosts_of(modules)
    for name, module in modules.items():
        host = hosts.get(name)
        if host is None:
            is_part = any(name.startswith(f"{outer}.") for outer in inside)
            if (reason := reason_of_unknown(module, modules.get(name.rpartition(".")[0]))) and not is_part:
                left[name] = reason
            continue
        inside.append(name)
        nearest = _nearest(name, embeds)
        if _is_over_time(name, type(module), nearest[0].name if nearest else ""):
            left[name] = _OVER_TIME
        elif "forward" in vars(module):
            left[name] = "its forward has been replaced on this very module (by hooks of accelerate?)"
        elif host.forward is None and not {host.mask, "**"}.intersection(parameters_of_forward(module)):
            left[name] = f"its forward takes no {host.mask}; a newer version of its library does"
        elif reason := _reason_against(host, module):
            left[name] = reason
        elif not nearest:
            left[name] = "no patch embedding was found: name as patch_embed the module that gives a map (B, D, H, W)"
        elif len(nearest) > 1:
            left[name] = f"of {len(nearest)} patch embeddings none is nearest: name it as patch_embed"
        else:
            able[name] = host, nearest[0]
    # What merely contains attention modules is none itself.
    left = {name: why for name, why in left.items() if not any(other.startswith(f"{name}.") for other in able)}
    return able, left


_OVER_TIME = "it attends over time"


def _is_over_time(name: str, cls: type[nn.Module], embed: str) -> bool:
    """What its names say, below what has the patch embedding too: Latte's temporal_transformer_blocks, attn_temp."""
    while name and name.partition(".")[0] == embed.partition(".")[0]:
        name, embed = name.partition(".")[2], embed.partition(".")[2]
    words = re.split(r"[^a-z]+", name.lower())
    return any("temporal" in word or word in ("temp", "time", "motion") for word in [*words, cls.__name__.lower()])


def _check_not_wrapped(model: nn.Module) -> None:
    if wrapped := wrapped_part(model):
        raise ValueError(
            "attention must be swapped before the model is wrapped for several processes, which would never "
            f"synchronise the gates: got {wrapped}."
        )


def _reason_against(host: Host, module: nn.Module) -> str:
    try:
        return str(host.answers(module)["reason_against"])
    except AttributeError as error:  # projections that another library has wrapped
        return f"it is not built as its class is: {error}"


def _patch_embeds(model: nn.Module, name: str | None) -> list[PatchEmbed]:
    if name is None:
        return patch_embeds_of(model)
    modules = dict(model.named_modules())
    if not name or name not in modules:
        said = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        meant = did_you_mean(name, filter(None, modules))
        raise ValueError(f"patch_embed must be the name of a module of the model: got {said}.{meant}")
    return [patch_embed_of(modules, name)]


def _nearest(name: str, embeds: list[PatchEmbed]) -> list[PatchEmbed]:
    """The patch embeddings in the smallest part of the model that has the named module and one of them."""
    while embeds:
        name = name.rpartition(".")[0]
        inside = [embed for embed in embeds if not name or f"{embed.name}.".startswith(f"{name}.")]
        if inside or not name:
            return inside
    return []


def _chosen(able: list[str], layers: Sequence[int] | None) -> list[str]:
    if layers is None:
        return able
    if any(not -len(able) <= i < len(able) for i in layers):
        raise ValueError(
            f"layers must be numbers of the model's {len(able)} attention modules, 0 to {len(able) - 1} or negative: "
            f"got {list(layers)}."
        )
    numbers = {i % len(able) for i in layers}
    return [name for i, name in enumerate(able) if i in numbers]


def _num_prefix_tokens(model: nn.Module, name: str, host: Host, given: int | None) -> int:
    known = host.num_prefix_tokens(model.get_submodule(name)) if given is None else given
    while known is None:
        name = name.rpartition(".")[0]
        known = num_prefix_tokens_of(model.get_submodule(name))
        if not name:
            return known or 0
    return known
