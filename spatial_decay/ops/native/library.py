"""Finds, checks and loads the shared object that build.py compiled, or says why there is no kernel here.

Nothing happens before the first question. The object serves every Python and torch: it is called through ctypes, and
runs its loops in parallel by libtorch's C function torch_parallel_for, whose address it is given.
"""

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

__all__ = ["kernel", "parallel_for", "reason", "variants"]

FOLDER = Path(__file__).resolve().parent
_X86 = ("DEFAULT", "AVX2", "AVX512", "AMX")


def reason() -> str | None:
    """Why the kernel cannot run here, and what to do; None where it can. To torch.compile it is a constant."""
    return _load()[1]


# What torch.compiler.assume_constant_result does, without its import of the compiler.
reason._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function


def variants() -> tuple[str, ...]:
    """The instruction sets that this processor can run, the best one last; ATEN_CPU_CAPABILITY lowers it."""
    best = torch.backends.cpu.get_cpu_capability()
    # The second question asks the system for the tiles, without which they are illegal instructions.
    if best == "AVX512" and sys.platform == "linux" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        best = "AMX"
    return _X86[: _X86.index(best) + 1] if best in _X86 else ("DEFAULT",)


@cache
def kernel(capability: str | None = None) -> Callable[..., int]:
    """The function int64_t (const Problem*, ParallelFor, int64_t is_backward), see source/problem.h.

    Args:
        capability: One of variants(); None: the best one.

    Raises:
        ValueError: this processor cannot run that instruction set.
        NotImplementedError: there is no kernel here.
    """
    name = variants()[-1] if capability is None else capability
    if name not in variants():
        raise ValueError(f"capability must be one of {', '.join(variants())} on this processor: got {capability!r}.")
    library, why_not = _load()
    if library is None:
        raise NotImplementedError(f"There is no native kernel here: {why_not}")
    function = library[f"spatial_decay_attention_{name}"]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_int64
    return function


@cache
def parallel_for() -> int | None:
    """The address of libtorch's torch_parallel_for; None where this torch has none."""
    # Elsewhere than on Windows a symbol is looked for in what a library needs too, so wherever libtorch_cpu lies.
    core = str(Path(torch.__file__).parent / "lib" / "torch_cpu.dll") if sys.platform == "win32" else torch._C.__file__
    try:
        function = ctypes.CDLL(core).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The shared object, or why not; torch is asked before the files, and the files are checked before they are run."""
    if parallel_for() is None:
        return None, f"torch {torch.__version__} has no torch_parallel_for: install torch 2.10 or newer"
    # Not above: `python -m` warns where what it is to run is imported already.
    from spatial_decay.ops.native import build

    fault = build.fault(FOLDER)
    if fault is not None and (FOLDER / build.OBJECT).exists():
        # A build that ends at this moment has replaced the object and not yet its record.
        time.sleep(0.1)
        fault = build.fault(FOLDER)
    if fault is not None:
        return None, fault
    path = FOLDER / build.OBJECT
    try:
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, f"{path} cannot be loaded ({error}): run: {build.rebuild_command(FOLDER)}"
