"""From a launch of the backend `triton` to the emulator: arguments, memory, and what is checked of the outputs."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx.kernel import Kernel
from tests.ptx.machine import Machine
from tests.ptx.memory import Array, Memory, Segment
from tests.ptx.shared import UNFENCED_COPY
from tests.ptx.triton_copy import adopt_new_modules, use_copy

__all__ = ["Emulation", "KernelError"]

# How many of its features, the last ones, a step writes.
_NUM_WRITTEN = {"forward": 1, "short forward": 1, "backward rows": 1, "backward columns": 2, "short backward": 3}
_FENCES_COPIES = (3, 8)
_THREADS_AT_ONCE = 1 << 14


class KernelError(AssertionError):
    """A kernel did what it may not do."""


class Emulation:
    """backend="triton" on CPU tensors, as compiled for a compute capability, until the end of a test.

    Args:
        monkeypatch: Of the test.
        capability: 80 for 8.0.

    Attributes:
        num_launches: Of kernels.
        num_instructions: Executed by warps.
        change: Done to the PTX of each kernel before it runs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
        from spatial_decay.ops import triton as room
        from spatial_decay.ops.triton import launch

        self.num_launches = self.num_instructions = 0
        self.change: Callable[[str], str] = lambda ptx: ptx
        # Triton has put a fence behind them since. Its programs ran before, and PTX's documentation asks for one.
        self._trusts_copies = (room._TRITON or (0, 0)) < _FENCES_COPIES
        self._rows: dict[int, Tensor] = {}  # written, by address; held, so that no other tensor gets it
        jit_function = use_copy(monkeypatch, capability)
        compile_or_run = jit_function.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
            compiled = compile_or_run(kernel, *args, grid=grid, warmup=True, **options)
            adopt_new_modules(monkeypatch)
            if not warmup:
                self._launch(compiled, grid[0], args, options)
            return compiled

        monkeypatch.setattr(jit_function, "run", run)
        monkeypatch.setattr(room, "_reasons_of_the_machine", lambda device: [])
        monkeypatch.setattr(launch, "_has_warp_groups", lambda device: capability in (90, 100))
        # What these modules keep from call to call holds for the interpreter.
        for module in [module for name, module in sys.modules.items() if name.startswith(room.__name__)]:
            for name, value in list(vars(module).items()):
                if hasattr(value, "cache_clear"):
                    monkeypatch.setattr(module, name, lru_cache(value.__wrapped__))

    def _launch(self, compiled: Any, num_ctas: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        findings: dict[str, tuple[int, str]] = {}

        def note(kind: str, text: str, count: int) -> None:
            if kind == UNFENCED_COPY and self._trusts_copies:
                return
            before, first = findings.get(kind, (0, text))
            findings[kind] = before + count, first

        kernel, flat, step = (
            _decoded(self.change(compiled.asm["ptx"])),
            _flat_arguments(compiled, args),
            options["STEP"],
        )
        features, rows = [tensor[0] for tensor in args[0]], args[1] or ()
        if "backward" in step and options["NUM_NUMBERS"] == 0:
            rows = rows[:-1]  # the gradient of what is not there
        outputs = features[-_NUM_WRITTEN[step] :] + [x for x in rows if x.data_ptr() not in self._rows]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        segments = _segments(tensors, outputs)
        memory = Memory(list(segments.values()), note)
        params = dict.fromkeys(kernel.params, np.int64(0))  # the last two are scratch memory, of which there is none
        params |= zip(kernel.params, map(_bits, flat), strict=False)
        at_once = max(1, _THREADS_AT_ONCE // kernel.num_threads)
        for first in range(0, num_ctas, at_once):
            num = min(at_once, num_ctas - first)
            machine = Machine(kernel, params, memory, compiled.metadata.shared, (first, num), num_ctas, note)
            self.num_instructions += machine.run() * num * kernel.num_threads // 32
        self.num_launches += 1
        for x in tensors:
            written = segments[x.untyped_storage().data_ptr()].written[_units(x)]
            if _is_one_of(x, outputs) and (written != 1).any():
                note("an output is not written exactly once", f"{written.min()} to {written.max()} times", 1)
            elif written.any() and not _is_one_of(x, [*outputs, *rows]):
                note("a store into an input", f"shape {tuple(x.shape)}", int(written.sum()))
        self._rows.update({x.data_ptr(): x for x in rows})
        if findings:
            lines = [f"{kind}, {count} times, first: {text}" for kind, (count, text) in findings.items()]
            raise KernelError("\n  ".join([f"{step}, {options['FORMULA']}:", *lines]))


@lru_cache(maxsize=64)
def _decoded(ptx: str) -> Kernel:
    return Kernel(ptx)


def _flat_arguments(compiled: Any, args: Sequence[Any]) -> list[Any]:
    """What the compiled kernel takes: tuples opened, constants left out."""
    flat = []

    def walk(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for one, of_it in zip(kind, value, strict=True):
                walk(one, of_it)
        elif kind != "constexpr":
            flat.append({"fp32": np.float32, "i32": np.int32, "i64": np.int64}.get(kind, lambda x: x)(value))

    for name, value in zip(compiled.src.fn.arg_names, args, strict=False):
        walk(compiled.src.signature[name], value)
    return flat


def _bits(value: Any) -> Any:
    """Of an argument."""
    if isinstance(value, Tensor):
        return np.int64(value.data_ptr())
    return value.view(np.uint32) if value.dtype.itemsize == 4 else value


def _segments(tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[int, Segment]:
    """The memory that a kernel may touch, by the address of a storage; outputs hold no value yet."""
    views: dict[int, list[Tensor]] = {}
    for x in tensors:
        views.setdefault(x.untyped_storage().data_ptr(), []).append(x)
    segments = {}
    for base, of_storage in views.items():
        num_bytes = of_storage[0].untyped_storage().nbytes()
        buffer = np.frombuffer((ctypes.c_uint8 * (-(-num_bytes // 8) * 8)).from_address(base), np.uint8)
        may, has_value = np.zeros(num_bytes // 2, bool), np.ones(num_bytes // 2, bool)
        for x in of_storage:
            units = _units(x)
            may |= units
            if _is_one_of(x, outputs):
                x.fill_(float("nan"))
                has_value &= ~units
        segments[base] = Segment(base, buffer, may, has_value)
    return segments


def _units(x: Tensor) -> Array:
    """Which pairs of bytes of its storage a tensor covers, bool."""
    size, num_bytes = x.element_size(), x.untyped_storage().nbytes()
    covered = torch.zeros(num_bytes // size, dtype=torch.bool)
    covered.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    units = covered.numpy().repeat(size // 2)
    return np.pad(units, (0, num_bytes // 2 - len(units)))


def _is_one_of(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(x is y for y in tensors)
