"""The Triton kernels as compiled for compute capability 8.0 and 9.0, against float64: see tests/ptx/__init__.py."""

import pytest
import torch

from tests.ops.test_triton import pytestmark as needs_triton
from tests.ptx.runs import SLOW, Run, checked

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("capability", "run"),
    [
        (80, Run("1d", (4, 5), 0, 16, torch.float32)),
        (90, Run("gaussian", (4, 33), 0, 32, differentiates=False)),
    ],
    ids=str,
)
def test_as_compiled(emulated, capability, run):
    """Others of the first tier run in test_mutations.py, before anything is removed from them."""
    emulation = emulated(capability)
    checked(run)
    assert emulation.num_launches > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "run"),
    [(80, run) for run in SLOW] + [(90, run) for run in SLOW if run.dtype != torch.float32 or run.kind == "full"],
    ids=str,
)
def test_much_as_compiled(emulated, capability, run):
    emulated(capability)
    checked(run)
