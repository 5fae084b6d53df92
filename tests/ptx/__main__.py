"""Runs everything of runs.py: python -m tests.ptx [--capability 80 90] [--only WORD ...] [--part 1/8]."""

import argparse
import sys
import time

import pytest
import torch

from tests.ptx.launch import Emulation
from tests.ptx.runs import checked, everything


def main() -> int:
    """A line for each run; how many failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="of the GPU, 80 for 8.0")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs whose names have all of these")
    parser.add_argument("--part", default="1/1", help="1/8: the first of eight parts, for several processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part, num_parts = map(int, arguments.part.split("/"))
    runs = dict.fromkeys(of for of in everything() if all(word in str(of).split("-") for word in arguments.only))
    num_failed = num_instructions = num_launches = 0
    for capability in arguments.capability:
        for of in list(runs)[part - 1 :: num_parts]:
            start = time.perf_counter()
            torch.manual_seed(0)
            with pytest.MonkeyPatch.context() as monkeypatch:
                emulation = Emulation(monkeypatch, capability)
                try:
                    text = f"ok   {max(checked(of)):.1e}"
                except Exception as error:  # one that fails does not keep the others from running
                    text, num_failed = f"FAIL {error}", num_failed + 1
            num_instructions += emulation.num_instructions
            num_launches += emulation.num_launches
            print(f"{capability} {of}: {text} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{num_launches} launches, {num_instructions / 1e6:.1f} million warp instructions, {num_failed} runs failed")
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
