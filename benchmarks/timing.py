"""How the benchmarks measure: interleaved rounds, ratios to a floor, peak memory, errors against float64."""

import ctypes
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Call",
    "Timing",
    "busy_seconds",
    "captured",
    "interleaved",
    "operator_table",
    "peak_memory",
    "reasons",
    "relative_error",
    "run_in_processes",
    "summary",
]

Call = Callable[[], Any]
"""What is measured: it does all of its work each time."""

_PROCESS = Path("/proc/self")  # Linux's account of the process that reads it
_CACHE_FLUSH_BYTES = 256 << 20  # several times any GPU's L2


@dataclass(frozen=True)
class Timing:
    """Time of one call, and how it compares with the floor's in the same round.

    Args:
        seconds: Median over the rounds.
        ratio: Median of the rounds' ratios to the floor.
        low: Their lower quartile.
        high: Their upper quartile.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    calls: Mapping[str, Call],
    floor: str,
    *,
    rounds: int,
    device: torch.device,
    warmup: int = 2,
    min_seconds: float = 0.02,
    cold_cache: bool = False,
    slow: float = math.inf,
    rounds_of_slow: int = 1,
) -> dict[str, Timing]:
    """Time the calls side by side, so that a machine that slows down slows all of them down.

    Args:
        calls: By name. Each is timed once in every round. The order changes from round to round, for who comes right
            after a relative finds more in the caches: each is as often first, and as often after each other. It is the
            same in each run.
        floor: Name of the call that the others are compared with.
        rounds: That count.
        device: Where the work is done.
        warmup: Rounds before these, which do not count.
        min_seconds: One timing repeats its call until it takes about this long, and divides.
        cold_cache: On CUDA, empty the L2 cache before each timing, and do not repeat.
        slow: What takes more than so many times the floor's time is left out after its first rounds.
        rounds_of_slow: How many rounds these are.
    """
    flush = torch.empty(_CACHE_FLUSH_BYTES if cold_cache and device.type == "cuda" else 0, dtype=torch.int8).to(device)
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        call()
        if not flush.numel():
            repeats[name] = max(1, math.ceil(min_seconds / max(_seconds(call, 1, device, flush), 1e-6)))
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        if i == warmup + rounds_of_slow:
            names = [name for name in names if summary(seconds[name], seconds[floor]).ratio <= slow]
        for name in _order(names, i - warmup):
            elapsed = _seconds(calls[name], repeats[name], device, flush)
            if i >= warmup:
                seconds[name].append(elapsed)
    return {name: summary(seconds[name], seconds[floor][: len(seconds[name])]) for name in calls}


def _order(names: Sequence[str], i: int) -> Sequence[str]:
    """Of round i, by a Williams design: 0, 1, -1, 2, -2 ... of n names, i further on, every second n rounds backwards.

    In n rounds each name comes at each place once. In n rounds, or in 2 * n where n is odd, each comes right after each
    other equally often.
    """
    n = len(names)
    order = [names[(i + (-k // 2 if k % 2 == 0 else k // 2 + 1)) % n] for k in range(n)]
    return order[::-1] if i // n % 2 else order


def _seconds(call: Call, repeats: int, device: torch.device, flush: Tensor) -> float:
    """Of one call, by CUDA's clock or the CPU's."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    flush.zero_()  # and while it runs, the first launch is prepared
    start_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000 / repeats


def busy_seconds(call: Call, device: torch.device) -> float | None:
    """How long a GPU works at one call, without the gaps in which it waits to be told more; None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def operator_table(call: Call, device: torch.device) -> str:
    """torch.profiler's table of one call, by operator, those first that take the most time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    sort_by = f"self_{device.type}_time_total"
    table: str = profile.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=60)
    return table


def captured(call: Call, device: torch.device) -> Call:
    """On CUDA the GPU's part of a call: recorded once in a CUDA graph, and replayed without Python. Elsewhere the call.

    Raises:
        RuntimeError: it does what cannot be captured.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made at the first calls only is not to be recorded
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay() -> Call:
        graph.replay()
        return call  # its inputs must live as long as the graph, which knows but their addresses

    return replay


def run_in_processes(function: Callable[..., object], jobs: Sequence[tuple[object, ...]]) -> None:
    """The function with each job's arguments, by several processes: so that compilers fill their caches on the disk.

    Then measuring one by one does not wait for them.

    Args:
        function: Of a module.
        jobs: What it is called with.

    Raises:
        Exception: what the first job that failed has raised.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
    num_processes = min(12, max(1, (os.cpu_count() or 1) - 1))  # each takes some of the GPU's memory
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        for future in [pool.submit(function, *job) for job in jobs]:
            future.result()


def summary(seconds: Sequence[float], floor: Sequence[float]) -> Timing:
    """Of times and of the floor's in the same rounds."""
    ratios = [a / b for a, b in zip(seconds, floor, strict=True)]
    # quantiles wants two values; of one round, the quartiles are the round itself.
    low, middle, high = statistics.quantiles(ratios * 2 if len(ratios) == 1 else ratios, n=4, method="inclusive")
    return Timing(statistics.median(seconds), middle, low, high)


def peak_memory(make_call: Callable[..., Call], *arguments: object, device: torch.device) -> int | None:
    """Bytes at the peak of a call, above what stood there before it: its output and gradients count, inputs do not.

    The call runs once before, so that libraries, compiled code and cached tables are in place.

    Args:
        make_call: Makes the inputs and the call; a function of a module, because on the CPU a new process runs it.
        arguments: Of make_call.
        device: CUDA's allocator counts for itself. On the CPU it is the resident memory of a fresh process, by
            Linux's high-water mark, which can be set back: getrusage's ru_maxrss cannot, and starts at the parent's.

    Returns:
        None where the system does not say.
    """
    if device.type == "cuda":
        call = make_call(*arguments)
        call()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not (_PROCESS / "clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident_peak, torch.get_num_threads(), make_call, arguments).result()


def _resident_peak(num_threads: int, make_call: Callable[..., Call], arguments: tuple[object, ...]) -> int:
    # M_MMAP_THRESHOLD = 64 kB: what is freed goes back to the system at once, and is counted when it is used again.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    torch.set_num_threads(num_threads)
    call = make_call(*arguments)
    call()
    (_PROCESS / "clear_refs").write_text("5")  # the high-water mark becomes what is resident now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """|found - wanted| / |wanted| in the Frobenius norm; the worst of several tensors. wanted is float64."""
    return max(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True))


def reasons(error: Exception) -> str:
    """Why a contender did not run, in one line: a backend's list of reasons, or what was raised."""
    lines = str(error).splitlines() or [""]
    listed = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    return "; ".join(listed) if listed else f"{type(error).__name__}: {lines[0]}"
