"""When the values of a tensor can be looked at: checks of them must never wait for a GPU or stop a compiler."""

import torch
from torch import Tensor

__all__ = ["are_readable"]


def are_readable(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on the CPU that nobody traces: torch.compile, torch.export, torch.func, make_fx.

    Nor torch.jit. What is traced holds for all values, and what was seen of these would become part of it. Nor a lazy
    negative or zero, whose memory holds other numbers than the tensor.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    functorch = torch._C._functorch
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or x.is_neg() or x._is_zerotensor():
            return False
        if functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x):
            return False
    return True
