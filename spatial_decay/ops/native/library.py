"""Finds, checks and loads the shared object that build.py compiled, or says why there is no kernel here.

Nothing happens before the first question. The object serves every Python and torch: it is called through ctypes, and
runs its loops in parallel by libtorch's C function torch_parallel_for, whose address it is given.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

__all__ = ["kernel", "parallel_for", "reason", "variants"]

FOLDER = Path(__file__).resolve().parent
_X86 = ("DEFAULT", "AVX2", "AVX512", "AMX")
_SYMBOL = "spatial_decay_attention_"


def reason() -> str | None:
    """Why the kernel cannot run here, and what to do; None where it can. To torch.compile it is a constant."""
    return _load()[1]


# What torch.compiler.assume_constant_result does, without its import of the compiler.
reason._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function


def variants() -> tuple[str, ...]:
    """The instruction sets that processor and object have, the best one last; ATEN_CPU_CAPABILITY lowers it."""
    best, library = torch.backends.cpu.get_cpu_capability(), _load()[0]
    if best == "AVX512" and _has_tiles():
        best = "AMX"
    names = _X86[: _X86.index(best) + 1] if best in _X86 else ("DEFAULT",)
    return tuple(name for name in names if hasattr(library, _SYMBOL + name))


def _has_tiles() -> bool:
    """Whether the processor has AMX and the system lets this process use it, which it has to be asked."""
    # Without the system's leave they are illegal instructions. A torch that cannot be asked has none for us.
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    needed = ("amx_tile", "amx_bf16", "avx512_bf16")
    return sys.platform == "linux" and all(map(has.get, needed)) and bool(getattr(torch.cpu, "_init_amx", bool)())


@cache
def kernel(capability: str | None = None) -> Callable[..., int]:
    """The function int64_t (const Problem*, ParallelFor, int64_t is_backward), see source/problem.h.

    Args:
        capability: One of variants(); None: the best one.

    Raises:
        ValueError: this processor cannot run that instruction set, or the object has none for it.
        NotImplementedError: there is no kernel here.
    """
    library, why_not = _load()
    if library is None:
        raise NotImplementedError(f"There is no native kernel here: {why_not}")
    names = variants()
    name = names[-1] if capability is None else capability
    if name not in names:
        raise ValueError(f"capability must be one of {', '.join(names)} on this processor: got {capability!r}.")
    function = library[_SYMBOL + name]
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
