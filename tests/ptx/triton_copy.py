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

_KERNELS = "spatial_decay.ops.triton.kernels"


def _is_copied(name: str) -> bool:
    """The extension module cannot be imported twice, and keeps nothing of who uses it."""
    is_triton = name == "triton" or name.startswith("triton.")
    return (is_triton and not name.startswith("triton._C")) or name == _KERNELS or name.startswith(f"{_KERNELS}.")


@cache
def _copy() -> dict[str, ModuleType]:
    """The modules of Triton and of the kernels, imported once more, without TRITON_INTERPRET."""
    before = {name: module for name, module in sys.modules.items() if _is_copied(name)}
    for name in before:
        del sys.modules[name]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            for name in ("triton.backends.nvidia.compiler", "triton.runtime.jit", "triton.compiler", _KERNELS):
                importlib.import_module(name)
        copy = {name: module for name, module in sys.modules.items() if _is_copied(name)}
    finally:
        for name in [name for name in sys.modules if _is_copied(name)]:
            del sys.modules[name]
        sys.modules.update(before)

    _leave_out_ptxas(copy["triton.backends.nvidia.compiler"].CUDABackend)
    return copy


def _leave_out_ptxas(backend: Any) -> None:
    """Its machine code is not what runs here. What Triton caches without it has a name of its own."""
    name_of = backend.hash
    backend.make_cubin = lambda self, src, metadata, options, capability: b""
    backend.hash = lambda self: f"{name_of(self)}-without-ptxas"


class NoGPU:
    """Stands for one of the given compute capability, 80 for 8.0."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return sys.modules["triton.backends.compiler"].GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0


def use_copy(monkeypatch: pytest.MonkeyPatch, capability: int) -> Any:
    """Puts the copy in Triton's place until the end of the test; returns its JITFunction."""
    copy = _copy()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in [name for name in sys.modules if _is_copied(name)]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in copy.items():
        monkeypatch.setitem(sys.modules, name, module)
    copy["triton.runtime.driver"].driver.set_active(NoGPU(capability))
    return copy["triton.runtime.jit"].JITFunction


def _forget():
    import gc
    _copy.cache_clear(); gc.collect()
