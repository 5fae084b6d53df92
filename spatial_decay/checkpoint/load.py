"""load_checkpoint: everything is checked and made ready before the model is changed."""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spatial_decay.checkpoint.files import read
from spatial_decay.checkpoint.names import NEW, ORIGINS, Origin, Weight, translated, weights_of
from spatial_decay.checkpoint.tensors import MUST, check_model, ready, reason_against, refusal

__all__ = ["CheckpointReport", "load_checkpoint"]


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


@torch.no_grad()
def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    origin: Origin = "native",
    ema: bool = False,
    strict: bool = True,
) -> CheckpointReport:
    """Load published weights into a model of the same structure. Everything is checked before anything is changed.

    Values go into the model's dtype and onto its device, where they may lose precision, but nothing else. Threads may
    load at the same time.

    Args:
        model: For "rmt" an SDTH of rmt_tiny and the like, for "locatvit" a ViT of locatvit_tiny and the like, for
            "dit" an SDTP with any decay.
        source: A file (torch.save, read with weights_only=True and with its sums checked; or .safetensors, which has no
            sums and needs the safetensors package), or what such a file holds. The weights may lie under "model" or
            "state_dict", and their names may begin with "module." or "_orig_mod.", as DistributedDataParallel and
            torch.compile leave them.
        origin: Whose names the weights have: "native" (this library's), "rmt", "locatvit" or "dit"
            (facebookresearch/DiT).
        ema: Take the averaged weights, under "model_ema" or "state_dict_ema".
        strict: Model and checkpoint must have the same weights. False loads what fits, for instance all but the
            classifier, and leaves the rest of the model as it is: read the report.

    Returns:
        A report of every name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown origin; a file that is none of these, or damaged; no weights in it, or two for one name;
            tensors on the meta device, sparse, quantized or nested ones, or other kinds of numbers than the model's;
            NaN, or infinite values that the model has not; numbers that the model's dtype cannot hold; a model on the
            meta device, or not initialised; with strict, any difference; without it, where nothing fits. The model is
            as it was.
        ImportError: .safetensors without the safetensors package.

    Examples:
        >>> from spatial_decay.models import locatvit_tiny
        >>> model = locatvit_tiny()
        >>> weights = {"state_dict": locatvit_tiny().state_dict()}
        >>> report = load_checkpoint(model, weights)
        >>> print(report)
        200 tensors loaded, 0 left to the model to compute
    """
    if origin not in ORIGINS:
        raise ValueError(f"origin must be one of {', '.join(ORIGINS)}: got {origin!r}.")
    own = model.state_dict()
    check_model(model, own)
    found = source if isinstance(source, Mapping) else read(Path(source))
    weights, derived = translated(weights_of(found, ema=ema), origin)
    _check_kinds(weights, own)
    report = _compared(weights, derived, own, re.compile(NEW.get(origin, "$^")))
    if not report.is_complete and (strict or not report.loaded):
        raise ValueError(
            f"the checkpoint does not fit the model, which stays as it was: {report}\n"
            "Build the model that the weights were trained with (size, classes, kind of decay, origin), or pass "
            "strict=False to load what fits, where anything does."
        )
    plain = {name: value for name, value in own.items() if not reason_against(value)}
    held = ready(((name, weights[name].tensor()) for name in report.loaded), plain)
    own.update(held)  # all of it, with the versions of its modules: some modules cannot load a part
    made_in_inference_mode = any(value.is_inference() for value in plain.values())
    with torch.inference_mode() if made_in_inference_mode else contextlib.nullcontext():
        model.load_state_dict(own)
    return report


def _check_kinds(weights: Mapping[str, Weight], own: Mapping[str, object]) -> None:
    """Raise where a weight that the model has is no ordinary tensor, here or there."""
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        if name not in own:
            continue
        for theirs, value in weight.sources.items():
            if reason := reason_against(value):
                reasons[theirs] = reason
        if reason := reason_against(own[name]):
            reasons[name] = f"of the model's own tensor, {reason}"
    if reasons:
        raise refusal(
            MUST,
            reasons,
            "Turn those of the checkpoint into plain tensors (to_dense, dequantize, full_tensor), and load before the "
            "model is sharded or quantized.",
        )


def _compared(
    weights: Mapping[str, Weight], derived: list[str], own: Mapping[str, Any], is_new: re.Pattern[str]
) -> CheckpointReport:
    """What would come from where."""
    both = [weight for name, weight in weights.items() if name in own]
    return CheckpointReport(
        loaded={weight.name: tuple(weight.sources) for weight in both if weight.shape == own[weight.name].shape},
        derived=tuple(derived),
        new=tuple(name for name in own if name not in weights and is_new.search(name)),
        missing=tuple(name for name in own if name not in weights and not is_new.search(name)),
        unexpected=tuple(theirs for name, weight in weights.items() if name not in own for theirs in weight.sources),
        mismatched={
            weight.name: (tuple(own[weight.name].shape), weight.shape)
            for weight in both
            if weight.shape != own[weight.name].shape
        },
    )
