"""Triton without its interpreter, beside the one in which the other tests interpret the kernels.

Whether Triton's own functions and our kernels are interpreted is decided when they are imported, and interpreting
leaves triton.language changed. So what compiles is a second import of both, in sys.modules only while it is used.
"""

import atexit
import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

import pytest

__all__ = ["adopt_new_modules", "use_copy"]

_KERNELS = "spatial_decay.ops.triton.kernels"


def use_copy(monkeypatch: pytest.MonkeyPatch, capability: int) -> Any:
    """Puts the copy in Triton's place until the end of the test; returns its JITFunction."""
    copy = _copy()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in _names():
        monkeypatch.delitem(sys.modules, name)
    for name, module in copy.items():
        monkeypatch.setitem(sys.modules, name, module)
    copy["triton.runtime.driver"].driver.set_active(_NoGPU(capability))
    return copy["triton.runtime.jit"].JITFunction


def adopt_new_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiling has imported belongs to the copy too, and goes with it."""
    copy = _copy()
    for name in set(_names()) - set(copy):
        copy[name] = sys.modules.pop(name)
        monkeypatch.setitem(sys.modules, name, copy[name])


class _NoGPU:
    """Stands for one of the given compute capability, 80 for 8.0."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return _copy()["triton.backends.compiler"].GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002  Triton passes it
        return 0


@cache
def _copy() -> dict[str, ModuleType]:
    """The modules of Triton and of the kernels, imported once more, without TRITON_INTERPRET."""
    before = {name: sys.modules.pop(name) for name in _names()}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            for name in ("triton.backends.nvidia.compiler", "triton.runtime.jit", "triton.compiler", _KERNELS):
                importlib.import_module(name)
        copy = {name: sys.modules.pop(name) for name in _names()}
    finally:
        sys.modules.update(before)
    backend: Any = copy["triton.backends.nvidia.compiler"].CUDABackend
    name_of = backend.hash
    # Machine code is not what runs here. What Triton keeps on disk without it has a name of its own.
    backend.make_cubin = lambda *_: b""
    backend.hash = lambda self: f"{name_of(self)}-without-ptxas"
    atexit.register(_clear, copy)
    return copy


def _names() -> list[str]:
    """What is imported twice: not the extension modules, which cannot be, and keep nothing of who uses them."""
    return [
        name
        for name in sys.modules
        if f"{name}.".startswith(("triton.", f"{_KERNELS}.")) and not name.startswith("triton._C")
    ]


def _clear(copy: dict[str, ModuleType]) -> None:
    """As Python does at its end with the modules that it knows: else Triton's extension module says that it leaks."""
    for module in copy.values():
        vars(module).clear()
