"""Compiles the Triton kernels by each schedule for GPUs that are not there: does it fit, and how much does it spill?

    python -m tests.ops.triton_limits           # all, some 20 minutes of a processor, and then what took the most
    python -m tests.ops.triton_limits --write   # ... kept as the table that test_triton_schedules.py looks at
    python -m tests.ops.triton_limits --worst   # of each capability the two that took the most in the table

By each schedule the works are compiled that no other work with it exceeds: the largest head_dim, a mask over keys,
prefix tokens or flags, a rest that is as long as a block. Squared takes what Manhattan does. Path and no decay take
less, and so does the short forward pass, which has the schedule of the backward pass. It runs in a process of its own,
without TRITON_INTERPRET.
"""

import argparse
import csv
import io
import itertools
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.triton.schedule import Work, from_table, num_warps_of_short
from tests.ops.triton_instructions import Shape, compiled, printed_by, row

TABLE = Path(__file__).with_suffix(".csv")
KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes that a program may take, by compute capability (CUDA programming guide, compute capabilities)."""
NUM_REGISTERS = 65536
"""Of a multiprocessor; a program may take all."""
FORMULAS_THAT_TAKE_MOST = ("manhattan", "gaussian", "euclidean")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # float16 takes what bfloat16 does


class Kernel(NamedTuple):
    """One to compile: a schedule, and a work that takes the most by it."""

    capability: int
    step: str
    dtype: str
    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int
    formula: str
    head_dim: int
    num_patches: int
    num_prefix: int
    has_key_mask: int
    has_flags: int


class Taken(NamedTuple):
    """What it takes."""

    shared_memory: int
    tensor_memory: int  # columns, of which capability 10.0 has 512
    registers: int
    stack: int  # bytes of a thread; registers are spilled there
    percent_spills: float  # of the instructions in its loop


def _works(has_warp_groups):
    """(step, dtype, work) of all that may take the most by their schedule."""
    yes_or_no = (0, 1)
    for dtype, formula, head_dim in itertools.product(DTYPES, FORMULAS_THAT_TAKE_MOST, (16, 32, 64, 80, 96, 128)):
        first = (formula, FORMULAS[formula].num_numbers, DTYPES[dtype], head_dim)
        # 255 tokens leave the longest rest. After blocks of 128 it is 64: with a longer one the table takes 64.
        for length, num_prefix, mask, flags in itertools.product((192, 255), (0, 5), yes_or_no, yes_or_no):
            if not (num_prefix and flags):  # tokens without a place are at the front, or have flags
                for step in ("forward", "backward rows", "backward columns"):
                    yield step, dtype, Work(*first, length, num_prefix, mask, flags, has_warp_groups)
        for length in (16, 32, 64, 128):
            work = Work(*first, length, 0, 1, 0, has_warp_groups)
            if work.num_numbers == 1 and num_warps_of_short(work):
                yield "short backward", dtype, work


def _exceeds(other, work):
    """Whether the other has more of something, and of nothing less."""
    fields = ("num_numbers", "head_dim", "num_patches", "num_prefix", "has_key_mask", "has_flags")
    pairs = [(getattr(other, name), getattr(work, name)) for name in fields]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def kernels():
    """All to compile."""
    found = []
    for capability in SHARED_MEMORY:
        groups = {}
        # Compiling takes longest in float32, which has no tensor cores: 8.0 and 8.9 do there as 8.6 does.
        for step, dtype, work in _works(has_warp_groups=capability in (90, 100)):
            if dtype != "float32" or capability not in (80, 89):
                groups.setdefault((step, dtype, from_table(step, work)), []).append(work)
        for (step, dtype, schedule), works in groups.items():
            for work in works:
                if not any(_exceeds(other, work) for other in works):
                    rest = [getattr(work, name) for name in Kernel._fields[-6:]]
                    found.append(Kernel(capability, step, dtype, *schedule, *rest))
    return found


def taken(kernel):
    """Compiles it."""
    values = {name: getattr(kernel, name) for name in Shape._fields if name in Kernel._fields}
    shape = Shape(**values, is_line=kernel.step.startswith("short"))
    ((name, binary, constants),) = compiled(shape, DTYPES[kernel.dtype], only=kernel.step)
    assert (constants["BLOCK_Q"], constants["BLOCK_K"]) == (kernel.queries, kernel.keys)
    printed = printed_by("cuobjdump", "--dump-resource-usage", binary)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()
    percent_spills = row(name, binary, constants, shape)["percent_spills"]
    return Taken(binary.metadata.shared, binary.metadata.tmem_size, int(registers), int(stack), percent_spills)


def faults(kernel, taken):
    """What is beyond the limits."""
    # An H200 was fastest with small programs of which several run at once, though they spill: see schedule.py.
    is_small = kernel.capability in (90, 100) and kernel.head_dim <= 80 and kernel.dtype != "float32"
    limits = Taken(
        shared_memory=SHARED_MEMORY[kernel.capability],
        tensor_memory=512,
        registers=min(kernel.max_registers or 255, NUM_REGISTERS // (32 * kernel.num_warps)),
        stack=taken.stack,  # how much of it a loop uses counts
        percent_spills=15 if is_small else 9 if kernel.dtype == "float32" else 5,
    )
    return more_than(limits, kernel, taken)


def more_than(limits, kernel, taken):
    """A line for each number that is larger."""
    triples = zip(Taken._fields, taken, limits, strict=True)
    return [f"{name} {number}, of at most {most}: {kernel}" for name, number, most in triples if number > most]


def as_text(table):
    """CSV, a line for each kernel, below the Triton that compiled them."""
    file = io.StringIO()
    file.write(f"Triton {triton.__version__}\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*Kernel._fields, *Taken._fields))
    writer.writerows((*kernel, *taken) for kernel, taken in table.items())
    return file.getvalue()


def kept():
    """The Triton that compiled the table, and the table."""
    first, _, *lines = TABLE.read_text(encoding="utf-8").splitlines()
    table = {}
    for line in csv.reader(lines):
        values = [int(value) if value.isdigit() else value for value in line[:-1]]
        table[Kernel(*values[: len(Kernel._fields)])] = Taken(*values[len(Kernel._fields) :], float(line[-1]))
    return first.removeprefix("Triton "), table


def worst(table):
    """Of each capability the kernels that take the most shared memory and spill the most."""
    found = {}
    for capability in SHARED_MEMORY:
        mine = [kernel for kernel in table if kernel.capability == capability]
        for name in ("shared_memory", "percent_spills"):
            kernel = max(mine, key=lambda kernel: getattr(table[kernel], name))
            found[kernel] = table[kernel]
    return found


def summary(table):
    """A line for each number of each capability: the most of it, and what takes that."""
    for capability, name in itertools.product(SHARED_MEMORY, Taken._fields):
        mine = [kernel for kernel in table if kernel.capability == capability]
        kernel = max(mine, key=lambda kernel: getattr(table[kernel], name))
        yield f"{capability}, {len(mine)} kernels: {name} {getattr(table[kernel], name)}: {tuple(kernel[1:])}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worst", action="store_true", help=f"only what took the most in {TABLE.name}")
    parser.add_argument("--write", action="store_true", help=f"keep the numbers in {TABLE.name}")
    arguments = parser.parse_args()
    before = worst(kept()[1]) if arguments.worst else {}
    chosen = list(before) or kernels()
    with ProcessPoolExecutor() as pool:
        table = dict(zip(chosen, pool.map(taken, chosen), strict=True))
    print(*summary(table), sep="\n")
    complaints = [line for kernel, numbers in table.items() for line in faults(kernel, numbers)]
    if before and kept()[0] == triton.__version__:
        complaints += [line for kernel in before for line in more_than(before[kernel], kernel, table[kernel])]
    if arguments.write and not arguments.worst:
        TABLE.write_text(as_text(table), encoding="utf-8")
    sys.exit("\n".join(complaints) or 0)
