"""The authors' published weights into this library's models: files are read, names translated, all checked first."""

import argparse
import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from spatial_decay.layout import Grid
from spatial_decay.models.sdt_p import sincos_positions

__all__ = ["ORIGINS", "CheckpointReport", "Origin", "load_checkpoint"]


Origin: TypeAlias = Literal["native", "rmt", "locatvit", "dit"]
"""Whose names the weights of a checkpoint have."""


@dataclass(frozen=True)
class CheckpointReport:
    """What came from where.

    Args:
        loaded: By name in the model, the names in the checkpoint that it came from.
        derived: Names in the checkpoint that the model computes itself.
        new: Names in the model that no checkpoint of this origin has, those of its decay; they keep their values.
        missing: Names in the model that the checkpoint has not; they keep their values.
        unexpected: Names in the checkpoint that the model has not.
        mismatched: By name in the model, its shape and the checkpoint's; they keep their values.
    """

    loaded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether model and checkpoint have the same weights."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.derived)} left to the model to compute"]
        lines += [f"  new in the model: {name}" for name in self.new]
        lines += [f"  missing from the checkpoint: {name}" for name in self.missing]
        lines += [f"  not in the model: {name}" for name in self.unexpected]
        lines += [f"  {name}: the model has {a}, the checkpoint {b}" for name, (a, b) in self.mismatched.items()]
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    origin: Origin = "native",
    ema: bool = False,
    strict: bool = True,
) -> CheckpointReport:
    """Load published weights into a model of the same structure. Everything is checked before anything is changed.

    Args:
        model: For "rmt" an SDTH of rmt_tiny and the like, for "locatvit" a ViT of locatvit_tiny and the like, for
            "dit" an SDTP with any decay.
        source: A file (torch.save, read with weights_only=True; or .safetensors, which needs the safetensors
            package), or what such a file holds. The weights may lie under "model" or "state_dict", and their names
            may begin with "module.", as DistributedDataParallel leaves them.
        origin: Whose names the weights have: "native" (this library's), "rmt", "locatvit" or "dit"
            (facebookresearch/DiT).
        ema: Take the averaged weights, under "model_ema" or "state_dict_ema".
        strict: Model and checkpoint must have the same weights. False loads what fits, for instance all but the
            classifier, and leaves the rest of the model as it is: read the report.

    Returns:
        A report of every name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown origin; a file that is none of these; no weights in it; with strict, any difference.
        ImportError: .safetensors without the safetensors package.

    Examples:
        >>> from spatial_decay.models import locatvit_tiny
        >>> model = locatvit_tiny()
        >>> report = load_checkpoint(model, {"state_dict": locatvit_tiny().state_dict()})
        >>> print(report)
        200 tensors loaded, 0 left to the model to compute
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin must be one of {', '.join(ORIGINS)}: got {origin!r}.")
    found = source if isinstance(source, Mapping) else _read(Path(source))
    state, sources, derived = ORIGINS[origin](_weights(found, ema=ema))
    own = model.state_dict()
    is_new = re.compile(_NEW.get(origin, "$^")).search
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    report = CheckpointReport(
        loaded={name: sources[name] for name in fitting},
        derived=tuple(derived),
        new=tuple(name for name in own if name not in state and is_new(name)),
        missing=tuple(name for name in own if name not in state and not is_new(name)),
        unexpected=tuple(theirs for name in state if name not in own for theirs in sources[name]),
        mismatched={
            name: (tuple(own[name].shape), tuple(value.shape))
            for name, value in state.items()
            if name in own and name not in fitting
        },
    )
    if strict and not report.is_complete:
        raise ValueError(
            f"the checkpoint does not fit the model, which stays as it was: {report}\n"
            "Build the model that the weights were trained with (size, classes, kind of decay, origin), or pass "
            "strict=False to load what fits."
        )
    model.load_state_dict({**own, **fitting})
    return report


def _read(path: Path) -> Mapping[str, Any]:
    """What a file holds, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    try:
        found = read(path)
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs the safetensors package: pip install safetensors.") from error
    except Exception as error:  # zip, pickle and header errors are of many kinds, and safetensors has its own
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a dict of weights: got {type(found).__name__}.")
    return found


def _read_torch(path: Path) -> object:
    with torch.serialization.safe_globals([argparse.Namespace]):  # RMT's files hold their command line
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> object:
    return importlib.import_module("safetensors.torch").load_file(path)


def _weights(found: Mapping[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """The weights of a file, without the prefixes of wrappers."""
    for key in ("model_ema", "state_dict_ema") if ema else ("model", "state_dict"):
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    else:
        if ema:
            raise ValueError(
                f"ema=True needs weights under 'model_ema' or 'state_dict_ema': got keys {', '.join(map(str, found))}."
            )
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in found.items()}
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        raise ValueError(
            "a checkpoint must be a dict of tensors, alone or under 'model' or 'state_dict': got "
            + (f"other values under {', '.join(others[:5])}." if others else "an empty one.")
        )
    return weights


Translated = tuple[dict[str, Tensor], dict[str, tuple[str, ...]], list[str]]
"""Weights by our names, the names that each came from, and names of what the model computes itself."""


def _native(weights: dict[str, Tensor]) -> Translated:
    return weights, {name: (name,) for name in weights}, []


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
    state: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    qkv: dict[str, dict[str, str]] = {}
    derived = [name for name in weights if ".Relpos." in name]
    for name, value in weights.items():
        if ".Relpos." in name:
            continue
        ours = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        ours = re.sub(r"^layers\.", "stages.", ours)
        for pattern, replacement in _RMT_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if match := re.fullmatch(r"(.*)\.retention\.([qkv])_proj\.(\w+)", ours):
            qkv.setdefault(f"{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = name
        else:
            state[ours] = value.flatten() if ours.endswith(".gamma") else value
            sources[ours] = (name,)
    for ours, parts in qkv.items():
        if set(parts) == set("qkv"):
            sources[ours] = tuple(parts[part] for part in "qkv")
            state[ours] = torch.cat([weights[name] for name in sources[ours]])
        else:  # as it is, to be reported as unexpected
            state |= {name: weights[name] for name in parts.values()}
            sources |= {name: (name,) for name in parts.values()}
    return state, sources, derived


def _locatvit(weights: dict[str, Tensor]) -> Translated:
    """timm's names, but for the Gaussians."""
    names = {name: name.replace(".attn.gaug.", ".attn.decay.gaussian.") for name in weights}
    return {names[name]: value for name, value in weights.items()}, {ours: (name,) for name, ours in names.items()}, []


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
    state = {ours: weights[name] for name, ours in names.items()}
    return state, {ours: (name,) for name, ours in names.items()}, derived


def _is_sincos(positions: Tensor) -> bool:
    """Whether (1, L, D) are the fixed positions of a square."""
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if not side or side**2 != positions.shape[1] or positions.shape[2] % 4:
        return False
    return torch.allclose(sincos_positions(positions.shape[2], Grid(side, side)), positions[0].float(), atol=1e-3)


ORIGINS: dict[str, Callable[[dict[str, Tensor]], Translated]] = {
    "native": _native,
    "rmt": _rmt,
    "locatvit": _locatvit,
    "dit": _dit,
}
"""By name, whose names of the weights are understood."""

_NEW = {"dit": r"\.attn\.(decay|lpe|output_gate)\."}
"""By origin, what a model may have and no checkpoint has: the shared weights are a DiT's, the rest starts afresh."""
