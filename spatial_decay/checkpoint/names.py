"""Whose names a checkpoint's weights have, and which of a model's weights each of them belongs to."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from spatial_decay.checkpoint.tensors import reason_against
from spatial_decay.layout import Grid
from spatial_decay.models.sdt_p import sincos_positions

__all__ = ["NEW", "ORIGINS", "Origin", "Translated", "Weight", "translated", "weights_of"]

Origin: TypeAlias = Literal["native", "rmt", "locatvit", "dit"]
"""Whose names the weights of a checkpoint have."""


@dataclass(frozen=True)
class Weight:
    """One of a model's weights as a checkpoint has it. Its shape costs nothing, however large a file says that it is.

    Args:
        name: The model's.
        sources: Tensors of the checkpoint by their names there, several one behind the other.
        squeezed: Without leading axes of length 1.
    """

    name: str
    sources: dict[str, Tensor]
    squeezed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        first, *others = (tuple(part.shape) for part in self.sources.values())
        if others:
            return (first[0] + sum(shape[0] for shape in others), *first[1:])
        while self.squeezed and len(first) > 1 and first[0] == 1:
            first = first[1:]
        return first

    def tensor(self) -> Tensor:
        """The whole weight."""
        parts = list(self.sources.values())
        return torch.cat(parts) if len(parts) > 1 else parts[0].detach().reshape(self.shape)


Translated: TypeAlias = tuple[list[Weight], list[str]]
"""A model's weights, and the names in the checkpoint of what the model computes itself."""


def weights_of(found: Mapping[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """The weights of a file, without the prefixes of wrappers."""
    places = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    inside = [found[key] for key in places if isinstance(found.get(key), Mapping)]
    if ema and not inside:
        raise ValueError(
            f"ema=True needs weights under 'model_ema' or 'state_dict_ema': got keys {', '.join(map(str, found))}. "
            "Leave ema out for the weights themselves."
        )
    if len(inside) > 1:
        raise ValueError(
            f"a checkpoint must have its weights in one place: got {' and '.join(map(repr, places))}. Pass one alone."
        )
    found = inside[0] if inside else found
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        raise ValueError(
            "a checkpoint must be a dict of tensors, alone or under 'model' or 'state_dict': got "
            + (f"other values under {', '.join(others[:5])}." if others else "an empty one.")
        )
    names = {name: re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in found}
    _check_one_each((short, [str(name)]) for name, short in names.items())
    return {names[name]: value for name, value in found.items()}


def translated(weights: dict[str, Tensor], origin: Origin) -> tuple[dict[str, Weight], list[str]]:
    """The model's weights by name, and the names in the checkpoint of what the model computes itself."""
    found, derived = ORIGINS[origin](weights)
    _check_one_each((weight.name, list(weight.sources)) for weight in found)
    return {weight.name: weight for weight in found}, derived


def _check_one_each(names: Iterable[tuple[str, list[str]]]) -> None:
    """No two names in the checkpoint may be the same one in the model."""
    together = defaultdict[str, list[list[str]]](list)
    for ours, theirs in names:
        together[ours].append(theirs)
    for ours, several in together.items():
        if len(several) > 1:
            both = " and ".join(", ".join(theirs) for theirs in several)
            raise ValueError(
                f"a checkpoint must have each weight once: got {both}, which are one name in the model, {ours}. "
                "The model stays as it was. Leave all but one out."
            )


def _native(weights: dict[str, Tensor]) -> Translated:
    return [Weight(name, {name: value}) for name, value in weights.items()], []


_RMT_NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"\.retention_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.retention\.out_proj\.", ".attn.proj."),
    (r"\.retention\.lepe\.", ".attn.lpe."),
    (r"\.ffn\.dwconv\.", ".mlp.conv."),
    (r"\.ffn\.", ".mlp."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^proj\.", "head_proj."),
    (r"^norm\.", "head_norm."),
)


def _rmt(weights: dict[str, Tensor]) -> Translated:
    """One matrix for q, k and v; downsampling at the start of a stage; positions and decays are made anew."""
    found: list[Weight] = []
    qkv = defaultdict[str, dict[str, str]](dict)
    derived = [name for name in weights if ".Relpos." in name]
    for name, value in weights.items():
        if ".Relpos." in name:
            continue
        ours = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        ours = re.sub(r"^layers\.", "stages.", ours)
        for pattern, replacement in _RMT_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if match := re.fullmatch(r"(.*)\.retention\.([qkv])_proj\.(\w+)", ours):
            qkv[f"{match[1]}.attn.qkv.{match[3]}"][match[2]] = name
        else:
            found.append(Weight(ours, {name: value}, squeezed=ours.endswith(".gamma")))
    for ours, names in qkv.items():
        parts = {names[part]: weights[names[part]] for part in "qkv" if part in names}
        if len(parts) == len("qkv") and _go_together(list(parts.values())):
            found.append(Weight(ours, parts))
        else:  # as it is, to be reported as unexpected
            found += [Weight(name, {name: part}) for name, part in parts.items()]
    return found, derived


def _go_together(parts: list[Tensor]) -> bool:
    """Whether they can lie one behind the other; what is no weight at all is refused later, under its name."""
    if any(reason_against(part) for part in parts):
        return True
    return parts[0].ndim > 0 and len({(part.dtype, part.device, part.shape[1:]) for part in parts}) == 1


def _locatvit(weights: dict[str, Tensor]) -> Translated:
    """timm's names, but for the Gaussians."""
    return [
        Weight(name.replace(".attn.gaug.", ".attn.decay.gaussian."), {name: value}) for name, value in weights.items()
    ], []


_DIT_NAMES = (
    (r"^x_embedder\.", "patch_embed."),
    (r"^t_embedder\.mlp\.", "t_embed."),
    (r"^y_embedder\.embedding_table\.", "y_embed."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"^final_layer\.modulation\.", "modulation."),
    (r"^final_layer\.linear\.", "head."),
)


def _dit(weights: dict[str, Tensor]) -> Translated:
    """DiT's positions are fixed ones, which are made anew; others are reported as unexpected."""
    derived = [name for name, value in weights.items() if name == "pos_embed" and _is_sincos(value)]
    names = {name: name for name in weights if name not in derived}
    for pattern, replacement in _DIT_NAMES:
        names = {name: re.sub(pattern, replacement, ours) for name, ours in names.items()}
    return [Weight(ours, {name: weights[name]}) for name, ours in names.items()], derived


def _is_sincos(positions: Tensor) -> bool:
    """Whether (1, L, D) are the fixed positions of a square."""
    if reason_against(positions) or not positions.is_floating_point():
        return False
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if not side or side**2 != positions.shape[1] or positions.shape[2] % 4 or positions.shape[0] != 1:
        return False
    if not positions.is_contiguous():  # a contiguous tensor is no larger than the file that it was in
        return False
    expected = sincos_positions(positions.shape[2], Grid(side, side))
    return torch.allclose(expected, positions[0].detach().float().cpu(), atol=1e-3)


ORIGINS: dict[str, Callable[[dict[str, Tensor]], Translated]] = {
    "native": _native,
    "rmt": _rmt,
    "locatvit": _locatvit,
    "dit": _dit,
}
"""By name, whose names of the weights are understood."""

NEW = {"dit": r"\.attn\.(decay|lpe|output_gate)\."}
"""By origin, what a model may have and no checkpoint has: the shared weights are a DiT's, the rest starts afresh."""
