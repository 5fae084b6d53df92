"""Backend `triton`: fused kernels for CUDA, forward and backward, and what they can run (SDT Eq. 10).

    O = softmax(scale * Q K^T + M) V

operators.py has the operators of torch.library, launch.py and schedule.py say how their kernels are launched,
ops/formulas.py which decays there are, and kernels/ has the mathematics. Memory beyond inputs, outputs and their
gradients is two numbers a token and head, three in float32. Nothing is added atomically: results repeat bit for bit. No
second derivatives, no torch.func transforms. A query all of whose scores lie below -1.1e7, where float32 has no digits
left for their differences, gets 0. Triton itself, which is large, is imported at the first call.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from spatial_decay.decay import GaussianDecay, PairwiseDecay
from spatial_decay.layout import Grid, Layout
from spatial_decay.ops.attn_mask import added_by
from spatial_decay.ops.formulas import FORMULAS, formula_of, reasons_of_decay
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.triton import operators
from spatial_decay.ops.triton.launch import TOO_FAR, capability_of, is_short, positions_of, reaches_too_far

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 128
_OLDEST_TRITON = (3, 3)  # the kernels take tuples, and make some with names


def _installed_triton() -> tuple[int, int] | None:
    """Its version, without importing it: it is large."""
    try:
        major, minor, *_ = version("triton").split(".")
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


_TRITON = _installed_triton()


def unsupported_reasons(inputs: Inputs) -> list[str]:
    """It needs Triton, a GPU that it knows, float32 or half precision, and at most a mask over keys."""
    return _reasons_of_the_machine(inputs.q.device) + _reasons_of_the_inputs(inputs)


def _reasons_of_the_machine(device: torch.device) -> list[str]:
    # Triton's interpreter, which TRITON_INTERPRET=1 turns on before the kernels are imported, runs on the CPU.
    is_interpreting = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreting:
        return [f"q is on {device.type} (needs cuda)"]
    if _TRITON is None:
        return ["Triton is not installed (pip install triton)"]
    if _TRITON < _OLDEST_TRITON:
        return [f"Triton {_TRITON[0]}.{_TRITON[1]} (needs {_OLDEST_TRITON[0]}.{_OLDEST_TRITON[1]} or newer)"]
    if is_interpreting:
        return []
    if torch.version.hip is not None:
        return ["q is on a ROCm device (needs cuda)"]
    major, minor = capability_of(device)
    return [] if major >= 8 else [f"compute capability {major}.{minor} (needs 8.0 or newer)"]


def _reasons_of_the_inputs(inputs: Inputs) -> list[str]:
    decay, mask, reasons = inputs.decay, inputs.attn_mask, []
    if inputs.q.dtype not in _DTYPES:
        reasons.append(f"{inputs.q.dtype} (needs float32, float16 or bfloat16)")
    if inputs.head_dim > _MAX_HEAD_DIM:
        reasons.append(f"head_dim={inputs.head_dim} (needs at most {_MAX_HEAD_DIM})")
    if inputs.scale <= 0:
        reasons.append(f"scale={inputs.scale} (needs one above 0)")
    reasons += reasons_of_decay(decay) or _reasons_of_a_known(decay)
    if far := _that_reach_too_far(inputs):
        reasons.append(f"the tokens of one sequence of {', '.join(far)} lie {TOO_FAR}")
    if mask is not None and mask.shape[2] > 1:
        reasons.append("attn_mask differs from query to query (needs one over keys, (B, 1, 1, L))")
    return reasons + inputs.shared_reasons()


def _reasons_of_a_known(decay: PairwiseDecay | None) -> list[str]:
    """Of what ops/formulas.py has, the kernels do not do all."""
    if getattr(decay, "hides_later", False):
        return ["a causal PathDecay (needs causal=False)"]
    if isinstance(decay, GaussianDecay) and decay.layout.largest_step > decay.max_distance:
        return [f"{decay.layout} with max_distance={decay.max_distance} (needs a Grid within it, or none)"]
    return []


def _that_reach_too_far(inputs: Inputs) -> list[str]:
    """Names of tensors; not asked of sizes that vary, on which a compiler would make it a condition."""
    if torch.compiler.is_compiling():
        return []
    strides = {"q": inputs.q.stride(-2), "k": inputs.k.stride(-2), "v": inputs.v.stride(-2)}
    if inputs.decay is not None:
        strides["decay"] = max(x.stride(-1) for x in inputs.decay.numbers)
    far = [name for name, stride in strides.items() if reaches_too_far(inputs.length, stride)]
    # Where O and the gradients lie says empty_heads: within an image in one piece.
    return [*far, "the output"] if inputs.q.shape[1:].numel() >= 2**31 else far


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Where others are faster, and where the program is to leave Python."""
    if inputs.q.device.type == "cpu":
        return ["on cpu it runs in Triton's interpreter, which is for tests"]
    if inputs.is_exporting:
        return ["torch.export: the program would need this package"]
    return ["without a decay PyTorch's own kernels do as well"] if inputs.decay is None else []


def attention(inputs: Inputs, *, tunes: bool = False) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in the dtype and shape of q; tunes: see autotune.py."""
    q = inputs.q
    formula = formula_of(inputs.decay)
    assert formula is not None  # else there is a reason
    if inputs.decay is None:
        layout: Layout = Grid(1, inputs.length)
        numbers = torch.zeros((), dtype=torch.float32, device=q.device).expand(1, 1, *q.shape[-3:-1])  # not read
    else:
        layout = inputs.decay.layout
        numbers = FORMULAS[formula].lowered(tuple(x.to(torch.float32) for x in inputs.decay.numbers))
    key_mask = None if inputs.attn_mask is None else added_by(inputs.attn_mask, q.dtype)[0]
    return operators.attend(
        *(is_short(q, formula, layout), q, inputs.k, inputs.v, formula, numbers, key_mask),
        *(positions_of(layout, formula, q), layout.num_prefix_tokens, inputs.scale, tunes),
    )
