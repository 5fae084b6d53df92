"""What the Python of a call of backend "triton" costs: microseconds without a GPU, the launch replaced by nothing.

    python -m benchmarks.calls                    # this checkout
    python -m benchmarks.calls ../before .        # checkouts in turn: compared with the first

Small tensors on the CPU stand for those on a GPU. In each call a decay is made of trained numbers. What counts is the
time on the processor, so that other processes do not.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from spatial_decay.decay import AxialDecay, Decay, ManhattanDecay, PathDecay, base
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention, triton



def axial(numbers: Tensor, grid: Grid) -> AxialDecay:
    """Of square grids."""
    width, height = Grid(1, grid.width), Grid(grid.height, 1)
    return AxialDecay(PathDecay(numbers, width), PathDecay(numbers, height), grid)


CASES: dict[str, tuple[int, int, tuple[int, int, int], Callable[..., Decay]]] = {
    "full 14x14 d64": (14, 64, (1, 1, 196), ManhattanDecay),
    "1d 14x14 d64": (14, 64, (1, 1, 196), PathDecay),
    "axial 28x28 d32": (28, 32, (28, 1, 28), axial),
}


def call_of(name: str, *, trains: bool) -> Callable[[], object]:
    """One call, with all gradients where it trains."""
    side, head_dim, shape, decay = CASES[name]
    grid = Grid(side, side)
    q, k, v, grad = (torch.empty(1, grid.num_tokens, 1, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkvg")
    numbers = torch.zeros(shape)
    leaves = [x.requires_grad_(trains) for x in (q, k, v, numbers)]

    def call() -> object:
        out: Tensor = decay_attention(q, k, v, decay(numbers, grid), backend="triton")
        return torch.autograd.grad(out, leaves, grad) if trains else out

    return call


def serve() -> None:
    """One number for each line of the input: the microseconds of the call that it names."""
    from triton.runtime.jit import KernelInterface

    torch.set_num_threads(1)
    with (
        patch.object(KernelInterface, "__getitem__", lambda *_: lambda *_, **__: None),
        patch.object(triton, "_reasons_of_the_machine", lambda _: []),
        patch.object(base, "are_readable", lambda *_: False),  # the values of a gate, which nobody looks at on a GPU
    ):
        calls = {f"{name}{what}": call_of(name, trains=bool(what)) for name in CASES for what in ("", TRAINING)}
        for line in sys.stdin:
            call, start, count = calls[line.rstrip("\n")], time.process_time(), 0
            while time.process_time() < start + 0.1:
                for _ in range(20):
                    call()
                count += 20
            print((time.process_time() - start) / count * 1e6, flush=True)


TRAINING = ", forward and backward"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()], help="folders (default: this one)")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each call (default: 30)")
    arguments = parser.parse_args()
    code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r})['serve']()"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in arguments.checkouts
    ]

    def timed(worker: "subprocess.Popen[str]", name: str) -> float:
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(name, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    for name in [f"{name}{what}" for name in CASES for what in ("", TRAINING)]:
        rounds = [[timed(worker, name) for worker in workers] for _ in range(arguments.rounds + 1)][1:]
        for folder, times in zip(arguments.checkouts, zip(*rounds, strict=True), strict=True):
            low, median, high = statistics.quantiles(times, n=4)
            ratio = statistics.median(x / one[0] for x, one in zip(times, rounds, strict=True))
            print(f"{name}: {folder}: {median:.0f} us ({low:.0f} to {high:.0f}), {ratio:.2f} of the first")
    for worker in workers:
        worker.communicate()


if __name__ == "__main__":
    main()
