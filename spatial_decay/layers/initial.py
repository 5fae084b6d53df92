"""Who gives a new parameter its first value: the layer itself, whichever library has made its memory."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

__all__ = ["Conv2d", "Initialised", "Linear", "fill_as_xavier", "fill_skipped"]


class Initialised(nn.Module):
    """A module that has its first values wherever memory comes from that nobody has filled.

    Checkpoints of host libraries lack our parameters, and the libraries make up for it each in its own way:

    - `to_empty`, which FSDP and others call, gives raw memory to what was on the meta device;
    - transformers builds on the meta device, gives raw memory to what a checkpoint lacks, and then says
      `module._is_hf_initialized = True` after filling the modules that it knows;
    - diffusers turns torch.nn.init off while it builds, so that fill does not use it;
    - accelerate's init_empty_weights empties each parameter as it is registered, and diffusers never fills those that a
      checkpoint lacks. Ours are few, and stay.

    Subclasses have parameters of their own, and fill them in `fill`.
    """

    _has_values = False  # on the meta device it has none, and it is not known who fills what comes from there
    _is_told = False  # by transformers, that it is initialised
    _is_a_hosts_kind = False  # which transformers would fill in a way of its own

    def fill(self) -> None:
        """Write the first values into the parameters, in place, with methods of Tensor."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The values of a new module."""
        self.fill()
        self._has_values = not self._is_on_meta()

    @property
    def _is_hf_initialized(self) -> bool:
        """Asked by transformers, which otherwise lets the model's _init_weights fill it. What that writes stays."""
        return self._is_told or (self._is_a_hosts_kind and self._has_values)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self._is_told = value
        if not value or self._has_values or self._is_on_meta():
            return
        kept = [(p, p.detach().clone()) for p in self.parameters(recurse=False) if self._is_filled(p)]
        self.reset_parameters()
        with torch.no_grad():
            for parameter, its_value in kept:
                parameter.copy_(its_value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        registered = self._parameters[name]
        if param is not None and registered is not None and registered.is_meta:
            self._parameters[name] = param  # accelerate's init_empty_weights has put an empty one there

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_on_meta = self._is_on_meta()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has not typed it
        is_emptied = was_on_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        if self._is_on_meta():
            self._has_values = False
        elif is_emptied:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(f"{prefix}{name}" in state_dict for name, _ in self.named_parameters(recurse=False)):
            self._has_values = self._is_told = not self._is_on_meta()

    def _is_filled(self, parameter: nn.Parameter) -> bool:
        """Loaded, which transformers marks; or written by somebody's _init_weights."""
        is_written = not parameter.is_inference() and parameter._version > 0 and not self._is_a_hosts_kind
        return is_written or getattr(parameter, "_is_hf_initialized", False)

    def _is_on_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.parameters(recurse=False))


class Linear(Initialised, nn.Linear):
    """PyTorch's, that sees to its first values."""

    _is_a_hosts_kind = True

    def fill(self) -> None:
        _fill_as_pytorch(self)


class Conv2d(Initialised, nn.Conv2d):
    """PyTorch's, that sees to its first values."""

    _is_a_hosts_kind = True

    def fill(self) -> None:
        _fill_as_pytorch(self)


def fill_skipped(*modules: nn.Module | None) -> None:
    """Fill new nn.Linear and nn.Conv2d as PyTorch would have, where torch.nn.init has been turned off by diffusers.

    Such layers are large, and stay PyTorch's own. Where accelerate empties them they fail loudly; raw memory is silent.
    """
    if nn.init.kaiming_uniform_.__module__ == "torch.nn.init":
        return
    for module in modules:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _fill_as_pytorch(module)


@torch.no_grad()
def fill_as_xavier(weight: Tensor) -> None:
    """As torch.nn.init.xavier_uniform_ does a matrix, and where that has been turned off too."""
    bound = math.sqrt(3.0) * math.sqrt(2.0 / sum(weight.shape))
    weight.uniform_(-bound, bound)


@torch.no_grad()
def _fill_as_pytorch(layer: nn.Linear | nn.Conv2d) -> None:
    """Uniform within 1 / sqrt(fan_in), what nn.Linear and nn.Conv2d begin with."""
    bound = 1 / math.sqrt(layer.weight[0].numel())
    layer.weight.uniform_(-bound, bound)
    if layer.bias is not None:
        layer.bias.uniform_(-bound, bound)
