"""Which sums stay in float32: gates, cumulative sums and rotary angles lose too much in half precision."""

import torch
from torch import Tensor

__all__ = ["at_least_float32", "autocast_disabled", "autocast_dtype", "check_like_weights"]

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_like_weights(name: str, x: Tensor, weights: object) -> None:
    """Raise where x and the weights that it is multiplied with differ in dtype or device, except under autocast.

    Weights of other kinds, quantised ones for instance, are left to say for themselves what they take.
    """
    if not isinstance(weights, Tensor) or weights.dtype not in _PLAIN:
        return
    if x.device != weights.device:
        raise ValueError(
            f"{name} must be on the device of the weights: got {x.device}, and weights on {weights.device}. Move one."
        )
    if x.dtype != weights.dtype and autocast_dtype(x.device) is None:
        raise TypeError(
            f"{name} must have the dtype of the weights: got {x.dtype}, and weights in {weights.dtype}. "
            "Convert one of the two, or use torch.autocast."
        )


def autocast_disabled(device: torch.device) -> torch.autocast:
    """A context in which autocast does not lower the operations of this device type."""
    return torch.autocast(device_type=_autocast_type(device), enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast lowers matrix products to on this device; None where it is off."""
    device_type = _autocast_type(device)
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _autocast_type(device: torch.device) -> str:
    """Tensors on "meta" stand for those of any device, and autocast does not know it."""
    return "cpu" if device.type == "meta" else device.type
