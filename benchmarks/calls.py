"""What the Python of a call of backend "triton" costs, without a GPU: the launch of a kernel is replaced by nothing.

    python -m benchmarks.calls               # this checkout
    python -m benchmarks.calls ../before .   # checkouts in turn

Small tensors on the CPU stand for those on a GPU. In each call a decay is made of trained numbers. What counts is the
time on the processor, so that other processes do not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PathDecay, base
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention, triton


def _axial(numbers: Tensor, grid: Grid) -> Decay:
    return AxialDecay(PathDecay(numbers, Grid(1, grid.width)), PathDecay(numbers, Grid(grid.height, 1)), grid)


CASES: dict[str, tuple[Callable[[Tensor, Grid], Decay], Grid, int, tuple[int, ...]]] = {
    "full, 14 x 14, head_dim 64": (ManhattanDecay, Grid(14, 14), 64, (1, 1, 196)),
    "1d, 14 x 14, head_dim 64": (PathDecay, Grid(14, 14), 64, (1, 1, 196)),
    "decomposed, 28 x 28, head_dim 32": (_axial, Grid(28, 28), 32, (28, 1, 28)),
}  # a decay of numbers, its grid, d, and the shape of the numbers


def microseconds(name: str, *, trains: bool) -> float:
    """Of one call; with all gradients where it trains."""
    decay, grid, head_dim, shape = CASES[name]
    *heads, grad = torch.zeros(4, 1, grid.num_tokens, 1, head_dim, dtype=torch.bfloat16).transpose(2, 3).unbind()
    leaves = q, k, v, numbers = [x.detach().requires_grad_(trains) for x in (*heads, torch.zeros(shape))]
    for count in (50, 1000):  # the first ones also plan the launches
        start = time.process_time()
        for _ in range(count):
            out = decay_attention(q, k, v, decay(numbers, grid), backend="triton")
            if trains:
                torch.autograd.grad(out, leaves, grad)
    return (time.process_time() - start) * 1e3


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()], help="folders (default: this one)")
    parser.add_argument("--rounds", type=int, default=10, help="of a process for each checkout (default: 10)")
    arguments = parser.parse_args(argv)
    command = [sys.executable, __file__, "one round"]
    found = [
        {folder: json.loads(subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(folder.resolve())}))}
        for _ in range(arguments.rounds)
        for folder in arguments.checkouts
    ]
    for name in next(iter(found[0].values())):
        for folder in arguments.checkouts:
            low, median, high = statistics.quantiles([one[folder][name] for one in found if folder in one])
            print(f"{name}: {folder}: {median:.0f} us ({low:.0f} to {high:.0f})")


if __name__ == "__main__" and sys.argv[1:] == ["one round"]:
    from triton.runtime.jit import KernelInterface

    torch.set_num_threads(1)
    with (
        patch.object(KernelInterface, "__getitem__", lambda *_: lambda *_, **__: None),
        patch.object(triton, "_reasons_of_the_machine", lambda _: []),
        patch.object(base, "are_readable", lambda *_: False),  # numbers on a GPU are not looked at
    ):
        results = {(name, trains): microseconds(name, trains=trains) for name in CASES for trains in (False, True)}
    print(json.dumps({f"{name}{', with gradients' * trains}": us for (name, trains), us in results.items()}))
elif __name__ == "__main__":
    main()
