"""When the values of a tensor can be looked at: checks of them must never wait for a GPU or stop a compiler."""

import torch
from torch import Tensor

__all__ = ["are_readable"]


def are_readable(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU that nobody traces: torch.compile, torch.export, torch.func, make_fx, jit.

    What is traced holds for all values, and what was seen of these would become part of it.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return False
    is_traced = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
    return not is_traced and not torch._C._functorch.is_functorch_wrapped_tensor(x)
