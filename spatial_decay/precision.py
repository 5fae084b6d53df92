"""Which sums stay in float32: gates, cumulative sums and rotary angles lose too much in half precision."""

import torch
from torch import Tensor

__all__ = ["at_least_float32", "autocast_disabled", "autocast_dtype"]


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_disabled(device: torch.device) -> torch.autocast:
    """A context in which autocast does not lower the operations of this device type."""
    return torch.autocast(device_type=_autocast_type(device), enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast lowers matrix products to on this device; None where it is off."""
    device_type = _autocast_type(device)
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _autocast_type(device: torch.device) -> str:
    """The device's own type, or "cpu" where it knows no autocast ("meta")."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"
