"""The operators of backend `native` for torch.library: allocate, call the kernel, and say what autograd needs.

    native: O = softmax(S) V, and two numbers a query    native_backward: dQ, dK, dV and dt of the numbers t, from dO

Both take the same inputs, which call.Operands describes.
"""

from typing import Any

import torch
from torch import Tensor

from spatial_decay.ops.native.call import Gradients, Operands, checked, run
from spatial_decay.ops.operands import empty_heads, summed_as, with_features_together
from spatial_decay.values import are_readable

__all__ = ["attend", "backward", "forward"]

# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str formula, Tensor numbers, Tensor? mask, Tensor? mask_tops, Tensor? positions, "
    "SymInt[] grid, float scale, float max_step"
)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """O, as q, and rows, (2, B, N, L) or (2, B, O, N, L), for the backward pass: see call.run."""
    operands = checked(Operands(*inputs))
    out, rows = empty_heads(operands.q), _empty_rows(operands.q)
    run(_with_features_together(operands), out, rows)
    return out, rows


def _backward(grad: Tensor, out: Tensor, rows: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    operands = checked(Operands(*inputs))
    q, numbers, of_rows = operands.q, operands.numbers, (2, *operands.q.shape[:-1])
    if grad.shape != q.shape or out.shape != q.shape or grad.dtype != q.dtype or out.dtype != q.dtype:
        raise ValueError(
            f"grad and out must be as q, {tuple(q.shape)} {q.dtype}: got {tuple(grad.shape)} {grad.dtype} and "
            f"{tuple(out.shape)} {out.dtype}."
        )
    if rows.shape != of_rows or rows.dtype != torch.float32 or not rows.is_contiguous():
        raise ValueError(f"rows must be {of_rows} float32, contiguous: got {tuple(rows.shape)} {rows.dtype}.")
    dq, dk, dv = empty_heads(q), empty_heads(q), empty_heads(q)
    dnumbers = numbers.new_empty((len(numbers), q.shape[:-3].numel(), *q.shape[-3:-1]))
    grad, out = with_features_together(grad), with_features_together(out)
    run(_with_features_together(operands), out, rows, Gradients(grad, dq, dk, dv, dnumbers))
    return dq, dk, dv, summed_as(dnumbers, numbers)


forward = torch.library.custom_op(
    "spatial_decay::native", _forward, mutates_args=(), device_types="cpu", schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
backward = torch.library.custom_op(
    "spatial_decay::native_backward",
    _backward,
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor out, Tensor rows, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return empty_heads(q), _empty_rows(q)


@backward.register_fake
def _(grad, out, rows, q, k, v, formula, numbers, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return empty_heads(q), empty_heads(q), empty_heads(q), numbers.new_empty(numbers.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # as torch calls it
    q, k, v, ctx.formula, numbers, mask, mask_tops, positions, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, numbers, mask, mask_tops, positions)


def _differentiate(ctx: Any, grad: Tensor, differentiate: Any) -> tuple[Tensor | None, ...]:
    out, rows, q, k, v, *others = ctx.saved_tensors
    dq, dk, dv, dnumbers = differentiate(grad, out, rows, q, k, v, ctx.formula, *others, *ctx.options)
    return dq, dk, dv, None, dnumbers, None, None, None, None, None, None


def _refuse(ctx, *gradients):  # type: ignore[no-untyped-def]  # as torch calls it
    raise NotImplementedError("backend 'native' has no second derivatives. Use backend='math', which has them.")


forward.register_autograd(lambda ctx, grad, _: _differentiate(ctx, grad, backward), setup_context=_save)
backward.register_autograd(_refuse)


class _Attention(torch.autograd.Function):
    """The same for tensors that nobody traces: a registered operator costs 90 us a call with gradients, this 25."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]  # as torch calls it
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]  # as torch calls it
        # With create_graph the operator, whose own gradient raises; what it would be is not silently 0. The operator
        # too for gradients that are traced or come in batches (is_grads_batched).
        is_plain = not torch.is_grad_enabled() and are_readable(grad)
        return _differentiate(ctx, grad, _backward if is_plain else backward)


def attend(*inputs: Any) -> Tensor:
    """O, as q, with gradients; inputs as in Operands."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not are_readable(*tensors):
        return forward(*inputs)[0]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out: Tensor = (_Attention.apply if needs_grad else _forward)(*inputs)[0]
    return out


def _with_features_together(operands: Operands) -> Operands:
    q, k, v = (with_features_together(x) for x in operands[:3])
    return operands._replace(q=q, k=k, v=v)


def _empty_rows(q: Tensor) -> Tensor:
    return q.new_empty((2, *q.shape[:-1]), dtype=torch.float32)
