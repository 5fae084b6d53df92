"""When the values of a tensor can be looked at: checks of them must never wait for a GPU or stop a compiler."""

import torch
from torch import Tensor

__all__ = ["are_readable"]


def are_readable(x: Tensor) -> bool:
    """Whether x is a plain tensor on the CPU, outside of torch.compile, torch.export and torch.func transforms."""
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return is_plain and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)
