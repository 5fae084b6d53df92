"""The Triton kernels as compiled for compute capability 8.0 and 9.0, against float64: see tests/ptx/__init__.py."""

import pytest
import torch

from tests.ops.test_triton import pytestmark as needs_triton
from tests.ptx.runs import SLOW, Run, checked

pytestmark = needs_triton


@pytest.mark.parametrize(
    ("capability", "run"),
    [
        (80, Run("full", (8, 12), 1, 32, mask="keys", batch_size=2)),
        (80, Run("decomposed", (3, 5), 0, 16, torch.float16)),
        (90, Run("1d", (4, 33), 0, 64)),
    ],
    ids=str,
)
def test_as_compiled(emulated, capability, run):
    emulation = emulated(capability)
    checked(run)
    assert emulation.num_launches >= 3


@pytest.mark.slow
@pytest.mark.parametrize("run", SLOW, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_much_as_compiled(emulated, capability, run):
    emulated(capability)
    checked(run)
