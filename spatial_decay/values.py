"""What may be said of a tensor: its shape always, its values only where that neither waits for a GPU nor is traced."""

import torch
from torch import Tensor

__all__ = ["are_plain", "are_readable", "in_words", "is_jit_tracing"]

_PLAIN = (Tensor, torch.nn.Parameter)


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace records: sizes are tensors then, and what Python asks of them holds for good."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def are_plain(*tensors: Tensor) -> bool:
    """Whether nobody traces these: torch.compile, torch.export, torch.func, make_fx, torch.jit.

    Then backends may call their kernels without an operator of torch.library in between. A lazy negative or zero is not
    plain: its memory holds other numbers than the tensor.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._are_functorch_transforms_active():  # these may be whole, and what they meet may not
        return False
    functorch = torch._C._functorch
    for x in tensors:
        if type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor():
            return False
        if functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x):
            return False
    return True


def are_readable(*tensors: Tensor) -> bool:
    """Whether these are plain and on the CPU.

    What is traced holds for all values, and what was seen of these would become part of it.
    """
    return are_plain(*tensors) and all(x.is_cpu for x in tensors)


def in_words(x: Tensor) -> str:
    """Its dtype, shape and device, for a repr that fits on a line: float32 (2, 3, 17) on cuda:0."""
    device = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{device}"
