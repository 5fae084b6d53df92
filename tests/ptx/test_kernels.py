"""The Triton kernels as compiled, instruction by instruction, against float64."""

import pytest
import torch

from spatial_decay.layout import Grid
from tests.cases import CASES
from tests.ops.test_triton import check, make


@pytest.mark.parametrize("capability", [80, 90])
def test_first(emulated, capability):
    emulation = emulated(capability)
    case = next(c for c in CASES if c.name == "full")
    check(make(case, Grid(9, 9, 1), head_dim=64, num_heads=1, dtype=torch.bfloat16), torch.bfloat16)
    print(emulation.num_launches, emulation.num_instructions)
