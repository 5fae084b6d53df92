"""How the Triton kernels cut their work: from a table, or, where a user asks for it, the fastest by timing.

The table is fixed, because timing at the first call may choose otherwise from run to run, and with it the last bits.
Half precision is multiplied by groups of four warps on compute capability 9 and 10, whose operands lie in shared
memory, and by single warps on others, whose operands take registers. For the first, up to head_dim 80, the table holds
what took the least time on an H200 (benchmarks/schedules.py): programs of four warps, of which two or three run on a
multiprocessor at a time, so that one computes while another waits. The rest was made without a GPU, from machine code
for 8.0, 8.9, 9.0, 10.0 and 12.0: of the tiles whose loops spill no registers or few, those with the fewest instructions
a score (tests/ops/triton_instructions.py). float32 is multiplied without tensor cores.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

__all__ = ["Schedule", "Step", "Work", "candidates", "fastest", "from_table", "num_warps_of_short", "power_of_two"]

Step: TypeAlias = Literal["forward", "backward rows", "backward columns", "short forward", "short backward"]
"""What a kernel does: the functions of kernels/long.py and kernels/short.py."""


class Schedule(NamedTuple):
    """How many queries and keys a program takes at a time, by how many warps, loading how many steps ahead.

    max_registers: Of a thread, where fewer than the compiler would take let more programs run side by side; 0: its own.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


class Work(NamedTuple):
    """What the best schedule depends on."""

    formula: str
    num_numbers: int  # of each query that the formula reads
    dtype: torch.dtype
    head_dim: int
    num_patches: int
    num_prefix: int
    has_key_mask: bool
    has_flags: bool  # of tokens that lie nowhere, anywhere in the sequence
    has_warp_groups: bool  # wgmma and its successor: compute capability 9 and 10


def from_table(step: Step, work: Work) -> Schedule:
    """The schedule of a kernel."""
    if step in ("short forward", "short backward"):
        block = max(16, power_of_two(work.num_patches))
        return Schedule(block, block, num_warps_of_short(work), 1)
    is_wide = work.head_dim > 64
    if work.dtype == torch.float32:
        return Schedule(32, 32, 8 if is_wide else 4, 2)
    if work.has_warp_groups and work.head_dim <= 80:
        if step == "forward":
            return Schedule(128, 64, 4, 3)
        if step == "backward rows":
            return Schedule(64, 32, 4, 2 if is_wide else 3, max_registers=128)
        return Schedule(64, 64, 4, 3) if is_wide else Schedule(32, 64, 4, 3, max_registers=168)
    if step == "forward":
        # 128 keys at a time take the fewest instructions; a last step of 128 that is half empty, or a mask, takes more.
        fits = not is_wide and not (work.has_key_mask or work.has_flags) and work.num_patches % 128 <= 64
        return Schedule(128, 128 if fits else 64, 8, 2)
    if step == "backward rows":  # three sums a query instead of one
        return Schedule(128, 32 if is_wide and work.num_numbers > 1 else 64, 8, 2)
    # dK and dV stay in registers: the wider they are, the fewer queries fit beside them.
    if work.head_dim > 96:
        return Schedule(32 if work.has_warp_groups else 16, 128, 8, 2)
    if is_wide:
        return Schedule(32, 64, 4, 2) if work.has_warp_groups else Schedule(32, 128, 8, 2)
    return Schedule(64, 64, 4, 2) if work.num_numbers > 1 else Schedule(64, 128, 8, 2)


def num_warps_of_short(work: Work) -> int:
    """Of the program that holds a whole sequence, and 0 where it is too long: as few as can, since none waits then."""
    head_dim, length = work.head_dim, work.num_patches
    if work.dtype == torch.float32:
        if length <= 32:
            return 4 if head_dim <= 32 else 8
        return 8 if length <= 64 and head_dim <= 16 else 0
    if length <= 32:
        return 1 if head_dim <= 64 else 2
    if length <= 64:
        return 2 if head_dim <= 32 else 4
    return 8 if length <= 128 and (head_dim <= 32 or work.has_warp_groups) else 0


_FORWARD = ((128, 64, 4), (64, 64, 4), (64, 32, 4), (128, 64, 8), (32, 32, 4))
_ROWS = ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 8), (32, 32, 4))
_COLUMNS = ((64, 64, 4), (32, 64, 4), (64, 128, 8), (16, 128, 8), (32, 32, 4))
_REGISTERS = (0, 168, 128)
"""Of a thread, with which 8, 12 and 16 warps run on a multiprocessor at once."""


def candidates(step: Step, first: Schedule) -> list[Schedule]:
    """What timing chooses from: the table's own first."""
    if step in ("short forward", "short backward"):
        others = [first._replace(num_warps=num_warps) for num_warps in (1, 2, 4, 8)]
    else:
        sizes = {"forward": _FORWARD, "backward rows": _ROWS, "backward columns": _COLUMNS}[step]
        others = [Schedule(*size, 3, registers) for size in sizes[:3] for registers in _REGISTERS]
        others += [Schedule(*size, 4) for size in sizes[:3]]
        others += [Schedule(*size, 2) for size in sizes]
    return [first, *(other for other in others if other != first)]


_MOST_KEPT = 1024
_FASTEST: dict[Hashable, Schedule] = {}


def fastest(key: Hashable, schedules: Sequence[Schedule], seconds: Callable[[Schedule], float | None]) -> Schedule:
    """The schedule with the fewest seconds, timed at the first call with this key.

    Args:
        key: What they may depend on.
        schedules: Those to choose from.
        seconds: Runs the kernel and times it; None where it does not fit into the GPU.
    """
    if key not in _FASTEST:
        times = {schedule: time for schedule in schedules if (time := seconds(schedule)) is not None}
        if not times:
            raise RuntimeError(f"none of {len(schedules)} schedules fits into this GPU: {key}. Take backend='auto'.")
        if len(_FASTEST) >= _MOST_KEPT:
            del _FASTEST[next(iter(_FASTEST))]  # the oldest
        _FASTEST[key] = min(times, key=times.__getitem__)
    return _FASTEST[key]


def power_of_two(n: int) -> int:
    """The smallest that is n or more."""
    return 1 << max(0, n - 1).bit_length()
