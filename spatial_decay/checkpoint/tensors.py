"""Which tensors can be weights of a model, and their values as the model will hold them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["MUST", "as_held", "check_model", "ready", "reason_against", "refusal"]

MUST = "each weight must be a plain tensor of numbers that the model's own tensor can hold"

_SHOWN = 10


def refusal(must: str, reasons: Mapping[str, str], advice: str) -> ValueError:
    """What must hold, of each name why it does not, and what to do."""
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN]]
    if len(reasons) > _SHOWN:
        lines.append(f"  and {len(reasons) - _SHOWN} more")
    return ValueError("\n".join([f"{must}, and the model stays as it was:", *lines, advice]))


def reason_against(value: object) -> str:
    """Why something is no tensor of ordinary memory, whose values can be copied; or nothing."""
    if not isinstance(value, Tensor):
        return f"it is no tensor: got {type(value).__name__}"
    if value.is_nested:
        return "it is nested"
    if type(value) not in (Tensor, nn.Parameter):  # DTensor, FakeTensor and the like
        return f"it is a {type(value).__name__}"
    if value.is_meta:
        return "it is on the meta device, without values"
    if value.layout != torch.strided:
        return f"it is {str(value.layout).removeprefix('torch.')}"
    return "it is quantized" if value.is_quantized else ""


def check_model(model: nn.Module, own: Mapping[str, object]) -> None:
    """Raise where a model has no memory that weights could be copied into."""
    reasons = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            reasons[name] = "it is not initialised yet"
        elif value.is_meta:
            reasons[name] = "it is on the meta device"
        elif name in own and not reason_against(value) and _repeats(value):
            reasons[name] = "it is an expanded tensor, whose rows share memory"
    if reasons:
        raise refusal(
            "weights can be copied only into a model with memory of its own",
            reasons,
            "Build the model on a device with memory, run one forward pass where it is lazy, clone what is expanded.",
        )


def _repeats(value: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def as_held(value: Tensor, own: Tensor) -> Tensor | str:
    """The value in the dtype and on the device of the model's own tensor, or why that cannot be."""
    ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (own.dtype, value.dtype))
    numbers = _numbers(own)
    if numbers != _numbers(value):
        return f"{theirs} numbers; the model has {ours}"
    try:
        held = value.to(device=own.device, dtype=own.dtype)
        if numbers == "floating point" and value.dtype.itemsize == 1:  # float8 has no arithmetic
            value = value.float()
    except (NotImplementedError, TypeError) as error:  # packed numbers, such as float4_e2m1fn_x2
        return f"{theirs} numbers cannot be turned into {ours}: {error}"
    if not own.numel() or numbers == "bool":
        return held
    # By the given values, not by infinities in what is held: conversion to float8 saturates.
    limits = torch.iinfo(own.dtype) if numbers == "integer" else torch.finfo(own.dtype)
    if _within(value, limits):
        return held
    if numbers == "integer":
        return _too_large(ours)
    finite = value.isfinite()
    if not (finite.to(own.device) | (held == own)).all():
        return "it has NaN or infinite values"
    return held if not finite.any() or _within(value[finite], limits) else _too_large(ours)


def _within(value: Tensor, limits: torch.finfo | torch.iinfo) -> bool:
    """One pass that makes nothing as large as the tensor; NaN is not within anything."""
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch.aminmax does not take them
        return max(value.flatten().tolist()) <= limits.max
    low, high = (number.item() for number in torch.aminmax(value))
    return limits.min <= low and high <= limits.max


def _too_large(ours: str) -> str:
    return f"it has numbers beyond {ours}'s largest"


def _numbers(value: Tensor) -> str:
    if value.dtype == torch.bool:
        return "bool"
    if value.is_complex():
        return "complex"
    return "floating point" if value.is_floating_point() else "integer"


def ready(values: Iterable[tuple[str, Tensor]], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, values that only have to be copied into the model's own tensors, one after the other.

    Raises:
        ValueError: the model could not hold some of them.
    """
    storages = {_place(value)[0] for value in own.values()}
    held: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    twins: dict[tuple[object, ...], str] = {}
    for name, given in values:
        value = as_held(given, own[name])
        if isinstance(value, str):
            reasons[name] = value
            continue
        if _place(value)[0] in storages:  # the model's own memory, which changes as the others are copied
            value = value.clone()
        held[name] = value
        twin = twins.setdefault(_place(own[name]), name) if value.numel() else name
        if twin != name and not torch.equal(held[twin], value):
            reasons[name] = f"the model has one tensor for it and {twin}, and the checkpoint two that differ"
    if reasons:
        raise refusal(MUST, reasons, "Mend them in the checkpoint, or leave them out and pass strict=False.")
    return held


def _place(value: Tensor) -> tuple[object, ...]:
    """Where a tensor lies: its storage first."""
    storage = value.device, value.untyped_storage().data_ptr()
    return storage, value.storage_offset(), value.shape, value.stride()
