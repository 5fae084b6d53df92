"""The operators of backend `native` for torch.library: allocate, call the kernel, and say what autograd needs.

    native: O = softmax(S) V, and for the backward pass two numbers a query    native_backward: dQ, dK, dV and dt, from dO

Both take the same inputs, which call.Operands describes.
"""

from typing import Any

import torch
from torch import Tensor

from spatial_decay.ops.native.call import Gradients, Operands, checked, run
from spatial_decay.ops.operands import empty_heads, summed_as, with_features_together

__all__ = ["backward", "forward"]

# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str formula, Tensor numbers, Tensor? mask, Tensor? mask_tops, Tensor? positions, "
    "SymInt[] grid, float scale, float max_step"
)


@torch.library.custom_op(
    "spatial_decay::native", mutates_args=(), device_types="cpu", schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """O, (B, O, N, L, d), and of each query the largest score and log2 of the sum beside it, (2, B, O, N, L)."""
    q, k, v, *others = checked(Operands(*inputs))
    out, rows = empty_heads(q), _empty_rows(q)
    run(Operands(*(with_features_together(x) for x in (q, k, v)), *others), out, rows)
    return out, rows


@torch.library.custom_op(
    "spatial_decay::native_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor out, Tensor rows, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(grad: Tensor, out: Tensor, rows: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    q, k, v, formula, numbers, *others = checked(Operands(*inputs))
    of_row = (2, *q.shape[:4])
    if grad.shape != q.shape or out.shape != q.shape or grad.dtype != q.dtype or out.dtype != q.dtype:
        raise ValueError(
            f"grad and out must be as q, {tuple(q.shape)} {q.dtype}: got {tuple(grad.shape)} {grad.dtype} and "
            f"{tuple(out.shape)} {out.dtype}."
        )
    if rows.shape != of_row or rows.dtype != torch.float32 or not rows.is_contiguous():
        raise ValueError(f"rows must be {of_row} float32, contiguous: got {tuple(rows.shape)} {rows.dtype}.")
    q, k, v, grad, out = (with_features_together(x) for x in (q, k, v, grad, out))
    dnumbers = numbers.new_empty((len(numbers), q.shape[0] * q.shape[1], *q.shape[2:4]))
    gradients = Gradients(grad, *(empty_heads(q) for _ in range(3)), dnumbers)
    run(Operands(q, k, v, formula, numbers, *others), out, rows, gradients)
    return *gradients[1:4], summed_as(dnumbers, numbers)


@forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return empty_heads(q), _empty_rows(q)


@backward.register_fake
def _(grad, out, rows, q, k, v, formula, numbers, *others):  # type: ignore[no-untyped-def]
    return empty_heads(q), empty_heads(q), empty_heads(q), numbers.new_empty(numbers.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.formula, numbers, mask, mask_tops, positions, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, numbers, mask, mask_tops, positions)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    out, rows, q, k, v, *others = ctx.saved_tensors
    dq, dk, dv, dnumbers = backward(grad, out, rows, q, k, v, ctx.formula, *others, *ctx.options)
    return dq, dk, dv, None, dnumbers, None, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


def _empty_rows(q: Tensor) -> Tensor:
    return q.new_empty((2, *q.shape[:4]), dtype=torch.float32)
