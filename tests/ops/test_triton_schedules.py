"""Each schedule of the Triton kernels fits into the GPUs that it is for, by what the compiler says."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.ops import triton_limits
from tests.ops.triton_limits import Kernel, Taken


def test_the_table_has_all_schedules():
    """Else: python -m tests.ops.triton_limits --write."""
    assert set(triton_limits.kernels()) == set(triton_limits.kept()[1])


def test_all_are_within_limits():
    assert [line for pair in triton_limits.kept()[1].items() for line in triton_limits.faults(*pair)] == []


def test_what_is_beyond_a_limit_is_said():
    kernel = Kernel(86, "backward rows", "bfloat16", 64, 64, 8, 2, 128, "manhattan", 128, 255, 0, 1, 1)
    (memory,) = triton_limits.faults(kernel, Taken(99 * 1024 + 1, 512, 128, 0, 0.0))
    assert memory.startswith("shared_memory 101377, of at most 101376: Kernel(capability=86, step='backward rows'")
    registers, spills = triton_limits.faults(kernel, Taken(99 * 1024, 0, 136, 999, 50.0))
    assert registers.startswith("registers 136, of at most 128: ")
    assert spills.startswith("percent_spills 50.0, of at most 5: ")


@pytest.mark.slow
def test_those_that_take_the_most_take_no_more():
    """Compiled anew: of each capability what takes the most shared memory and what spills the most."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton_limits", "--worst"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
