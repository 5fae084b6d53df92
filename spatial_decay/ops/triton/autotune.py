"""Backend `triton_autotune`: that of `triton`, with tiles timed at the first call for each shape. By name only.

O = softmax(scale * Q K^T + M) V (SDT Eq. 10), as there.
"""

from torch import Tensor

from spatial_decay.ops import triton
from spatial_decay.ops.inputs import Inputs

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

unsupported_reasons = triton.unsupported_reasons


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Always: what was fastest may change from run to run, and the last bits with it."""
    del inputs
    return ["it times its kernels at the first call for each shape, and the last bits depend on what was fastest"]


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in the dtype and shape of q."""
    return triton.attention(inputs, tunes=True)
