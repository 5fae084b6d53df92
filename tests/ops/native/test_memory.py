"""Backend `native`: its memory, a run under the sanitizers, and thousands of random shapes; all in the tier `slow`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_decay.ops.native import build, library
from tests.cases import needs_native

ROOT = Path(__file__).parents[3]
pytestmark = [needs_native, pytest.mark.slow]


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from Linux's /proc")
@pytest.mark.parametrize("mask", ["None", "torch.zeros(1, 1, 1, 128 * 128)"], ids=["", "key mask"])
def test_memory_is_bounded(mask):
    """128 x 128 tokens train in less than 64 MiB beyond inputs, outputs and gradients; a mask of theirs is 1 GiB."""
    code = f"""
import pathlib, torch
from spatial_decay.decay import ManhattanDecay
from spatial_decay.layout import Grid
from spatial_decay.ops import decay_attention

def run(side, attn_mask=None):
    q, k, v = (torch.randn(1, 2, side * side, 32, requires_grad=True) for _ in range(3))
    a = (-torch.rand(1, 2, side * side)).requires_grad_()
    out = decay_attention(q, k, v, ManhattanDecay(a, Grid(side, side)), attn_mask=attn_mask, backend="native")
    out.backward(torch.ones_like(out))

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

torch.set_num_threads(2)
for warm in (20, 40):
    run(warm)
before = resident("VmRSS")
run(128, {mask})
print(resident("VmHWM") - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    tensors = 9 * 2 * 128**2 * 32 * 4 / 2**20  # q, k, v, out, their gradients and the output's
    assert float(done.stdout) - tensors < 64, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' library is loaded as Linux does")
def test_under_the_sanitizers(tmp_path):
    """Random calls of every instruction set: nothing is read or written outside, nothing is undefined."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    build.compile_object(tmp_path / "kernels.so", flags=flags)
    code = f"""
import ctypes, sys
import torch
from spatial_decay.ops.native import library
from tests.ops import random_calls

sanitized = ctypes.CDLL({str(tmp_path / "kernels.so")!r})
torch.set_num_threads(3)
types = library.kernel().argtypes, library.kernel().restype
for name in library.variants():
    kernel = getattr(sanitized, "spatial_decay_attention_" + name)
    kernel.argtypes, kernel.restype = types
    library.kernel = lambda: kernel
    print(name, flush=True)
    if random_calls.main():
        sys.exit(1)
"""
    asan = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {"LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", code, "--calls", "60", "--seed", "11", "--backends", "native"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("60 calls of seed 11: 0 wrong") == len(library.variants())


def test_random_shapes():
    command = [
        sys.executable,
        "-m",
        "tests.ops.random_calls",
        "--calls",
        "2000",
        "--seed",
        "15",
        "--backends",
        "native",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "2000 calls of seed 15: 0 wrong" in done.stdout, done.stdout + done.stderr
