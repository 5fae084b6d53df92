"""Compiles the Triton kernel for GPUs that are not there, and reads from the machine code what a score costs.

    python -m tests.ops.triton_instructions           # a row for each kernel, as JSON
    python -m tests.ops.triton_instructions --write   # ... kept as the table that test_triton.py compares with

It calls the backend's own operators, with launching replaced by compiling, so that tiles and specialisations are those
of a real call. It runs in a process of its own, without TRITON_INTERPRET.
"""

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.triton import launch, operators

TABLE = Path(__file__).with_suffix(".json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NoDriver:
    """Stands for a GPU of the given compute capability where something is compiled and never run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):  # noqa: ARG002  Triton passes it
        return 0


class Shape(NamedTuple):
    """What a forward and a backward pass are compiled for."""

    capability: int
    formula: str
    head_dim: int
    num_patches: int = 256
    num_prefix: int = 0
    has_key_mask: bool = False
    has_flags: bool = False  # Positions, some tokens of which lie nowhere
    is_line: bool = False  # one of many rows of a grid, so long


def compiled(shape, dtype=torch.bfloat16, only=None):
    """(name, kernel, constants) of all kernels of a forward and a backward pass, or of that with the name `only`."""
    found = []

    def compile_only(self, grid):
        def call(*args, **kwargs):
            if only not in (None, kwargs["STEP"]):
                return
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            found.append((kwargs["STEP"], kernel, kwargs))

        return call

    length = shape.num_patches + shape.num_prefix
    num_lines = shape.num_patches if shape.is_line else 1
    q, k, v, grad = (
        torch.empty(2, num_lines, length, 4, shape.head_dim, dtype=dtype).transpose(2, 3) for _ in range(4)
    )
    numbers = torch.zeros(max(FORMULAS[shape.formula].num_numbers, 1), q.shape[0] * q.shape[1], 4, length)
    mask = torch.zeros(2, 1, 1, length) if shape.has_key_mask else None
    positions = torch.zeros(2, 3, length) if shape.has_flags else torch.zeros(1, 2, length)
    arguments = (q, k, v, shape.formula, numbers, mask, positions, shape.num_prefix, 0.125, False)
    driver.set_active(NoDriver(shape.capability))
    with (
        patch.object(KernelInterface, "__getitem__", compile_only),
        patch.object(launch, "_has_warp_groups", lambda device: shape.capability in (90, 100)),
    ):
        if shape.is_line:
            operators.short_forward._init_fn(*arguments)
            operators.short_backward._init_fn(grad, *arguments)
        else:
            out, lse = operators.forward._init_fn(*arguments)
            operators.backward._init_fn(grad, out, lse, *arguments)
    return found


def printed_by(tool, option, kernel):
    """What a tool that Triton brings along prints of its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def disassembled(kernel):
    """The instructions, and the loops among them as (first, last)."""
    instructions, labels, loops = [], {}, []
    for text in printed_by("nvdisasm", "-c", kernel).splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", text):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text):
            instructions.append(instruction.group(1))
    for index, text in enumerate(instructions):
        if (target := re.search(r"\bBRA\b.*(\.L_x_\d+)", text)) and labels[target.group(1)] < index:
            loops.append((labels[target.group(1)], index))
    return instructions, loops


def row(name, kernel, constants, shape):
    """What one kernel costs: its loop over tiles of scores, or all of a kernel that has none."""
    instructions, loops = disassembled(kernel)
    inside = [instructions[first : last + 1] for first, last in loops]
    inside = [loop for loop in inside if any("MMA" in text for text in loop)]
    num_scores = constants["BLOCK_Q"] * constants["BLOCK_K"]
    main = max(inside, key=len) if inside else instructions  # tails and prefixes are smaller
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", text)) for text in main)
    return {
        "kernel": name,
        **shape._asdict(),
        "tensor_cores": any("MMA" in text for text in main),
        "percent_spills": round(100 * spills / len(main), 1),
        "instructions_per_score": round(len(main) * constants["num_warps"] * 32 / num_scores, 2),
    }


# Each kernel takes some 3 seconds of a processor: those that have each part of the others once.
COMPILED = [
    Shape(90, "manhattan", 64),
    Shape(90, "gaussian", 64),
    Shape(90, "euclidean", 64),
    Shape(90, "squared", 64),
    Shape(90, "manhattan", 64, 196, 1, has_key_mask=True),
    Shape(90, "path", 64, 196, has_flags=True),
    Shape(80, "manhattan", 128, 196, 1),
    Shape(90, "path", 64, 128, is_line=True),
    Shape(80, "path", 16, 56, is_line=True),
]


def rows(shape):
    """A row for each kernel of a shape."""
    return [row(*found, shape) for found in compiled(shape)]


def table():
    """A row for each kernel, and the Triton that compiled them."""
    with ProcessPoolExecutor() as pool:
        kernels = list(chain.from_iterable(pool.map(rows, COMPILED)))
    return {"triton": triton.__version__, "kernels": kernels}


def as_text(table):
    """JSON, a line for each kernel."""
    lines = ",\n".join("    " + json.dumps(row) for row in table["kernels"])
    return f'{{\n  "triton": "{table["triton"]}",\n  "kernels": [\n{lines}\n  ]\n}}\n'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {TABLE.name}")
    arguments = parser.parse_args()
    text = as_text(table())
    print(text, end="")
    if arguments.write:
        TABLE.write_text(text, encoding="utf-8")
