"""Gradient checkpointing, seen from inside: which checkpoints the running code is in, and which one computes again.

PyTorch tells no one. But a checkpoint has one object that is the same in its forward pass and when it computes again,
which lives as long as its graph and no longer, and Python's stack has it: the context of an autograd function
(use_reentrant=True, and other libraries' checkpoints), or the record of torch.utils.checkpoint (use_reentrant=False).
Where a version of PyTorch keeps it elsewhere, nothing is found and attention refuses to compute again: no guess.
"""

import sys
from types import FrameType
from typing import Any

import torch

__all__ = ["running_backward", "running_checkpoints"]


def running_checkpoints() -> tuple[list[Any], Any | None]:
    """The checkpoints around the running code, innermost first; and the one that computes again, None if none does."""
    around: list[Any] = []
    library = vars(sys.modules["torch.utils.checkpoint"]) if "torch.utils.checkpoint" in sys.modules else None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            checkpoint = frame.f_locals.get("ctx")  # functions may delete it
            if isinstance(checkpoint, torch.autograd.function.FunctionCtx):
                if code.co_name == "backward":
                    return around, checkpoint
                around.append(checkpoint)
        elif frame.f_globals is library:
            variables = frame.f_locals
            if code.co_name == "unpack_hook" and "frame" in variables:
                return around, variables["frame"]
            running = getattr(variables.get("gen"), "gi_frame", None)
            if running is not None and "new_frame" in running.f_locals:
                around.append(running.f_locals["new_frame"])
        frame = frame.f_back
    return around, None


def running_backward() -> int:
    """The number of the backward pass that runs in this thread, as torch.utils.checkpoint knows it; -1 outside."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
