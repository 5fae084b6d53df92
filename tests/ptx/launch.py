"""Launches of compiled kernels on CPU tensors: the PTX that Triton makes for a GPU, executed by the emulator."""

import ctypes
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ptx.kernel import Kernel
from tests.ptx.machine import Machine
from tests.ptx.memory import Memory, Segment
from tests.ptx.triton_copy import use_copy

# How many of the features, the last ones, a step writes. Of the rows it writes what no launch before it has written.
_NUM_WRITTEN = {"forward": 1, "short forward": 1, "backward rows": 1, "backward columns": 2, "short backward": 3}
_THREADS_AT_ONCE = 1 << 14


class Fault(AssertionError):
    """What a kernel did that it may not do."""


class Emulation:
    """backend="triton" on CPU tensors, as compiled for a compute capability.

    Args:
        capability: 80 for 8.0.

    Attributes:
        num_launches: Of kernels.
        num_instructions: Executed, counted a warp.
        mutate: What is done to the PTX before it runs, text -> text.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.num_launches = self.num_instructions = 0
        self.mutate = lambda ptx: ptx
        self._written: dict[int, Tensor] = {}  # by address; held, so that no other tensor gets it

    def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until the end of the test."""
        from spatial_decay.ops import triton as room
        from spatial_decay.ops.triton import launch

        jit_function = use_copy(monkeypatch, self.capability)
        compile_it = jit_function.run

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
            compiled = compile_it(kernel, *args, grid=grid, warmup=True, **options)
            if not warmup:
                self._launch(compiled, grid, args, options)
            return compiled

        monkeypatch.setattr(jit_function, "run", run)
        monkeypatch.setattr(room, "_reasons_of_the_machine", lambda device: [])
        monkeypatch.setattr(launch, "_has_warp_groups", lambda device: self.capability in (90, 100))
        # What these modules keep from call to call holds for the interpreter.
        for module in [module for name, module in sys.modules.items() if name.startswith(room.__name__)]:
            for name, value in list(vars(module).items()):
                if hasattr(value, "cache_clear"):
                    monkeypatch.setattr(module, name, lru_cache(value.__wrapped__))

    def _launch(self, compiled: Any, grid: Any, args: Any, options: dict[str, Any]) -> None:
        code = _decoded(self.mutate(compiled.asm["ptx"]))
        flat = _flat_arguments(compiled, args)
        step, (features, rows) = options["STEP"], args[:2]
        written = [tensor[0] for tensor in features][-_NUM_WRITTEN[step] :]
        written += [x for x in (rows or ()) if x.data_ptr() not in self._written]
        if options["NUM_NUMBERS"] == 0 and "backward" in step:
            written = [x for x in written if x is not rows[-1]]  # the gradient of what is not there
        findings: dict[str, list[Any]] = {}

        def note(kind: str, where: str, count: int) -> None:
            findings.setdefault(kind, [0, where])[0] += count

        segments = _segments([x for x in flat if isinstance(x, Tensor)], written)
        memory = Memory([segment for segment, _ in segments.values()], note)
        params = dict(zip(code.params, map(_bits, flat), strict=False))
        params |= dict.fromkeys(code.params[len(flat) :], np.int64(0))
        at_once = max(1, _THREADS_AT_ONCE // code.num_threads)
        for first in range(0, grid[0], at_once):
            num = min(at_once, grid[0] - first)
            machine = Machine(code, params, memory, compiled.metadata.shared, (first, num), grid[0], note)
            self.num_instructions += machine.run() * num * code.num_threads // 32
        self.num_launches += 1
        for x in written:
            self._written[x.data_ptr()] = x
            counts = segments[x.untyped_storage().data_ptr()][0].written[_units(x)]
            if (counts != 1).any():
                note("output not written once", f"{(counts == 0).sum()} never", int((counts != 1).sum()))
        if findings:
            lines = [f"{kind}: {count} times, first at {where}" for kind, (count, where) in findings.items()]
            raise Fault("\n".join([f"{step}, {options['FORMULA']}, compute capability {self.capability}", *lines]))


@lru_cache(maxsize=64)
def _decoded(ptx: str) -> Kernel:
    return Kernel(ptx)


def _flat_arguments(compiled: Any, args: Any) -> list[Any]:
    """What the compiled kernel takes: tuples opened, constants left out."""
    flat = []

    def walk(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for one in zip(kind, value, strict=True):
                walk(*one)
        elif kind != "constexpr":
            flat.append(np.float32(value) if kind == "fp32" else np.int32(value) if kind == "i32" else value)

    for name, value in zip(compiled.src.fn.arg_names, args, strict=False):
        walk(compiled.src.signature[name], value)
    return flat


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return np.int64(value.data_ptr())
    return np.int64(value) if isinstance(value, int) else np.asarray(value).view(np.uint32)[()]


def _segments(tensors: list[Tensor], written: list[Tensor]) -> dict[int, Any]:
    """By the address of their storage: the memory that the kernel may touch. What it is to write holds no value yet."""
    views: dict[int, list[Tensor]] = {}
    for x in tensors:
        views.setdefault(x.untyped_storage().data_ptr(), []).append(x)
    segments = {}
    for base, of_storage in views.items():
        num_bytes = of_storage[0].untyped_storage().nbytes()
        buffer = np.frombuffer((ctypes.c_uint8 * (-(-num_bytes // 8) * 8)).from_address(base), np.uint8)
        may, has_value = np.zeros(num_bytes // 2, bool), np.ones(num_bytes // 2, bool)
        for x in of_storage:
            may |= _units(x)
            if any(x is y for y in written):
                x.fill_(float("nan"))
                has_value &= ~_units(x)
        segments[base] = Segment(base, buffer, may, has_value), of_storage
    return segments


def _units(x: Tensor) -> Any:
    """Which pairs of bytes of its storage a tensor covers, bool."""
    size = x.element_size() // 2
    covered = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=torch.bool)
    covered.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    rest = x.untyped_storage().nbytes() // 2 - len(covered) * size
    return np.pad(covered.numpy().repeat(size), (0, rest))
