"""The operators of backend `triton` for torch.library: allocate, launch the kernels, and say what autograd needs.

    forward: O = softmax(S) V, and lse for the backward pass         short_forward: O alone
    backward: dQ, dK, dV and dt of the numbers t, from dO            short_backward: the same, from the inputs alone

All take the same inputs, here in the order of their schemas:

    q, k, v       (B, N, L, d), or (B, O, N, L, d) where the sequences are the O rows or columns of a grid; any strides
    formula       a name in ops/formulas.py
    numbers       (num_numbers, B * O | 1, N, L) float32, as its row there makes them; (1, ...) without decay
    key_mask      added to all scores of a key, (B * O | 1, N | 1, 1, L); or None
    positions     of launch.positions_of: (1, 2, L), or (B | 1, 3, L) of Positions
    num_prefix    tokens without a position, first in the sequence
    scale         multiplies Q K^T
    tunes         whether schedules are timed
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.operands import empty_heads, summed_as, with_features_together
from spatial_decay.ops.triton.launch import Launch, reaches_too_far
from spatial_decay.ops.triton.schedule import Step
from spatial_decay.values import are_plain

__all__ = ["attend", "backward", "forward", "short_backward", "short_forward"]

# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py. What an operator does not look at
# itself, it hands on to Launch, whose arguments come in the same order.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str formula, Tensor numbers, Tensor? key_mask, Tensor positions, int num_prefix, "
    "float scale, bool tunes"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Of sequences of any length O, as q, and lse: one number a query, in float32 two, see long.py."""
    lse = _empty_lse(q)
    return _output("forward", (lse,), q, k, v, *others), lse


def _short_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """O of short sequences without prefix tokens, as q."""
    return _output("short forward", (), q, k, v, *others)


def _output(step: Step, rows: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    out = empty_heads(q)
    launch = Launch(step, (*[with_features_together(x) for x in (q, k, v)], out), rows, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return out


def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    dq = empty_heads(q)
    dk, dv = torch.empty_like(dq), torch.empty_like(dq)
    q, k, v, grad = [with_features_together(x) for x in (q, k, v, _within_reach(grad))]
    delta, dnumbers = torch.empty_like(lse[0]), _empty_gradient(q, formula, numbers)
    row_tensors, inputs = (lse, delta, dnumbers), (formula, numbers, *others)
    rows = Launch("backward rows", (q, k, v, out, grad, dq), row_tensors, *inputs)
    columns = Launch("backward columns", (q, k, v, grad, dk, dv), row_tensors, *inputs)
    with torch.cuda.device_of(q):
        # Both schedules first: whenever columns runs, also to be timed, it adds to what rows wrote.
        of_rows, of_columns = rows.schedule(), columns.schedule()
        rows(of_rows)
        columns(of_columns)
    return dq, dk, dv, summed_as(dnumbers, numbers)


def _short_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    dq = empty_heads(q)
    dk, dv = torch.empty_like(dq), torch.empty_like(dq)
    q, k, v, grad = [with_features_together(x) for x in (q, k, v, _within_reach(grad))]
    dnumbers = _empty_gradient(q, formula, numbers)
    launch = Launch("short backward", (q, k, v, grad, dq, dk, dv), (dnumbers,), formula, numbers, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return dq, dk, dv, summed_as(dnumbers, numbers)


def _operator(name: str, function: Callable[..., Any], inputs: str, outputs: str) -> Any:
    return torch.library.custom_op(
        f"spatial_decay::{name}", function, mutates_args=(), schema=f"({inputs}) -> ({outputs})"
    )


_GRADIENTS = "Tensor, Tensor, Tensor, Tensor"
forward = _operator("triton", _forward, _INPUTS, "Tensor, Tensor")
backward = _operator("triton_backward", _backward, f"Tensor grad, Tensor out, Tensor lse, {_INPUTS}", _GRADIENTS)
short_forward = _operator("triton_short", _short_forward, _INPUTS, "Tensor")
short_backward = _operator("triton_short_backward", _short_backward, f"Tensor grad, {_INPUTS}", _GRADIENTS)


@forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return empty_heads(q), _empty_lse(q)


@short_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]  # as torch calls it
    return empty_heads(q)


@backward.register_fake
def _(grad, out, lse, *inputs):  # type: ignore[no-untyped-def]  # as torch calls it
    return _fake_gradients(*inputs)


@short_backward.register_fake
def _(grad, *inputs):  # type: ignore[no-untyped-def]  # as torch calls it
    return _fake_gradients(*inputs)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return empty_heads(q), empty_heads(q), empty_heads(q), torch.empty(numbers.shape, device=numbers.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # as torch calls it
    q, k, v, ctx.formula, numbers, key_mask, positions, *ctx.options = inputs
    results = output if isinstance(output, tuple) else ()  # O and lse
    if results:
        ctx.mark_non_differentiable(results[1])
    ctx.save_for_backward(*results, q, k, v, numbers, key_mask, positions)


def _differentiate(ctx: Any, grad: Tensor, long: Any, short: Any) -> tuple[Tensor | None, ...]:
    *results, q, k, v, numbers, key_mask, positions = ctx.saved_tensors
    differentiate = long if results else short
    inputs = q, k, v, ctx.formula, numbers, key_mask, positions, *ctx.options
    dq, dk, dv, dnumbers = differentiate(grad, *results, *inputs)
    return dq, dk, dv, None, dnumbers, None, None, None, None, None


def _differentiate_traced(ctx, grad, *_):  # type: ignore[no-untyped-def]  # as torch calls it
    return _differentiate(ctx, grad, backward, short_backward)


def _refuse(ctx, *gradients):  # type: ignore[no-untyped-def]  # as torch calls it
    raise NotImplementedError("backend 'triton' has no second derivatives. Use backend='math', which has them.")


forward.register_autograd(_differentiate_traced, setup_context=_save)
short_forward.register_autograd(_differentiate_traced, setup_context=_save)
backward.register_autograd(_refuse)
short_backward.register_autograd(_refuse)


class _Attention(torch.autograd.Function):
    """The same for tensors that nobody traces: a registered operator costs 60 us more a call with gradients."""

    @staticmethod
    def forward(ctx, is_short, *inputs):  # type: ignore[no-untyped-def]  # as torch calls it
        output = (_short_forward if is_short else _forward)(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]  # as torch calls it
        # With create_graph the operator, whose own gradient raises; what it would be is not silently 0. The operator
        # too for gradients that are traced or come in batches (is_grads_batched).
        is_plain = not torch.is_grad_enabled() and are_plain(grad)
        functions = (_backward, _short_backward) if is_plain else (backward, short_backward)
        return None, *_differentiate(ctx, grad, *functions)


def attend(
    is_short: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    formula: str,
    numbers: Tensor,
    key_mask: Tensor | None,
    positions: Tensor,
    *others: Any,
) -> Tensor:
    """O, as q, with gradients."""
    inputs = q, k, v, formula, numbers, key_mask, positions, *others
    if not are_plain(q, k, v, numbers, positions, *(() if key_mask is None else (key_mask,))):
        output = (short_forward if is_short else forward)(*inputs)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, numbers)):
        output = _Attention.apply(is_short, *inputs)
    else:
        output = (_short_forward if is_short else _forward)(*inputs)
    out: Tensor = output if is_short else output[0]
    return out


def _within_reach(grad: Tensor) -> Tensor:
    """The output's gradient, copied where the kernels cannot reach all of it: nobody can ask for its strides before."""
    return grad.contiguous() if reaches_too_far(grad.shape[-2], grad.stride(-2)) else grad


def _empty_lse(q: Tensor) -> Tensor:
    """One or two numbers a query, (1 or 2, B, N, L) or (1 or 2, B, O, N, L)."""
    return q.new_empty((1 + (q.dtype == torch.float32), *q.shape[:-1]), dtype=torch.float32)


def _empty_gradient(q: Tensor, formula: str, numbers: Tensor) -> Tensor:
    """Of numbers, but for each sequence, (num_numbers, B * O, N, L); zeros where no kernel writes them."""
    if FORMULAS[formula].num_numbers == 0:
        return torch.zeros_like(numbers)
    return numbers.new_empty((numbers.shape[0], q.shape[:-3].numel(), *q.shape[-3:-1]))
