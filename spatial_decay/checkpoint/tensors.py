"""Which tensors can be weights of a model, and their values as the model will hold them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["as_held", "check_model", "ready", "reason_against", "refusal"]

_SHOWN = 10


def refusal(reasons: Mapping[str, str]) -> ValueError:
    """What must hold, and of each name why it does not."""
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_SHOWN]]
    if len(reasons) > _SHOWN:
        lines.append(f"  and {len(reasons) - _SHOWN} more")
    return ValueError("the weights cannot be loaded into the model, which stays as it was:\n" + "\n".join(lines))


def reason_against(value: object) -> str:
    """Why something is no tensor of ordinary memory, whose values can be copied; or nothing."""
    if not isinstance(value, Tensor):
        return f"it is no tensor: got {type(value).__name__}"
    if value.is_nested:
        return "it is nested; a weight must be one strided tensor"
    if type(value) not in (Tensor, nn.Parameter):  # DTensor, FakeTensor and the like
        return f"it is a {type(value).__name__}; a weight must be a plain tensor (of a DTensor, full_tensor())"
    if value.is_meta:
        return "it is on the meta device, without values"
    if value.layout != torch.strided:
        return f"it is {str(value.layout).removeprefix('torch.')}; a weight must be strided: to_dense()"
    if value.is_quantized:
        return "it is quantized; a weight must be a plain tensor: dequantize()"
    return ""


def check_model(model: nn.Module, own: Mapping[str, object]) -> None:
    """Raise where a model has no memory that weights could be copied into."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    reasons = {}
    for name, value in named.items():
        if is_lazy(value):
            reasons[name] = "the model's is not initialised yet; run one forward pass before"
        elif value.is_meta:
            reasons[name] = "the model's is on the meta device; build the model on a device with memory"
        elif name in own and not reason_against(value) and _repeats(value):
            reasons[name] = "the model's repeats its own memory (it was expanded); make it a clone() before"
    if reasons:
        raise refusal(reasons)


def _repeats(value: Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def as_held(value: Tensor, own: Tensor) -> Tensor | str:
    """The value in the dtype and on the device of the model's own tensor, or why that cannot be."""
    ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (own.dtype, value.dtype))
    if _numbers(value) != _numbers(own):
        return f"{theirs} numbers; the model has {ours}"
    try:
        held = value.to(device=own.device, dtype=own.dtype)
        wide = value if value.dtype.itemsize > 1 else value.to(torch.promote_types(value.dtype, torch.float32))
    except (NotImplementedError, TypeError) as error:  # packed numbers, such as float4_e2m1fn_x2
        return f"{theirs} numbers cannot be turned into {ours}: {error}"
    if not own.numel() or own.dtype == torch.bool:
        return held
    if _numbers(own) == "integer":
        numbers, limits = value.flatten().tolist(), torch.iinfo(own.dtype)
        return held if limits.min <= min(numbers) and max(numbers) <= limits.max else _too_large(ours)
    finite = wide.isfinite()
    if not finite.all() and not (finite.to(own.device) | (held == own)).all():
        return "it has NaN or infinite values"
    # Not by looking for infinities in what is held: conversion to float8 saturates.
    largest = wide.abs().max() if finite.all() else wide[finite].abs().max() if finite.any() else torch.zeros(())
    return held if largest.double() <= torch.finfo(own.dtype).max else _too_large(ours)


def _too_large(ours: str) -> str:
    return f"it has numbers beyond {ours}'s largest; the model would not hold them"


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
        raise refusal(reasons)
    return held


def _place(value: Tensor) -> tuple[object, ...]:
    """Where a tensor lies: its storage first."""
    storage = value.device, value.untyped_storage().data_ptr()
    return storage, value.storage_offset(), value.shape, value.stride()
