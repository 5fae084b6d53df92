"""The operators of backend `triton` for torch.library: allocate, launch the kernels, and say what autograd needs.

    forward: O = softmax(S) V, and lse for the backward pass         short_forward: O alone
    backward: dQ, dK, dV and dt of the numbers t, from dO            short_backward: the same, from the inputs alone

All take the same inputs, here in the order of their schemas:

    q, k, v       (B, O, N, L, d): O rows or columns of a grid where these are the sequences, else 1; any strides
    formula       a name in ops/formulas.py
    numbers       (num_numbers, B * O | 1, N, L) float32, as its row there makes them; (1, ...) without decay
    key_mask      added to all scores of a key, (B * O | 1, N | 1, 1, L); or None
    positions     of launch.positions_of: (1, 2, L), or (B | 1, 3, L) of Positions
    num_prefix    tokens without a position, first in the sequence
    scale         multiplies Q K^T
    tunes         whether schedules are timed
"""

from typing import Any

import torch
from torch import Tensor

from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.operands import empty_heads, summed_as, with_features_together
from spatial_decay.ops.triton.launch import Launch, reaches_too_far

__all__ = ["backward", "forward", "short_backward", "short_forward"]

# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py. What an operator does not look at
# itself, it hands on to Launch, whose arguments come in the same order.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str formula, Tensor numbers, Tensor? key_mask, Tensor positions, int num_prefix, "
    "float scale, bool tunes"
)


@torch.library.custom_op("spatial_decay::triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Of sequences of any length O, (B, O, N, L, d), and lse, (1, B, O, N, L); in float32 two numbers, see long.py."""
    out, lse = empty_heads(q), _empty_lse(q)
    launch = Launch(
        "forward",
        (with_features_together(q), with_features_together(k), with_features_together(v), out),
        (lse,),
        *others,
    )
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return out, lse


@torch.library.custom_op(
    "spatial_decay::triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    dq, dk, dv = (empty_heads(q) for _ in range(3))
    q, k, v, grad = (with_features_together(x) for x in (q, k, v, _within_reach(grad)))
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


@torch.library.custom_op("spatial_decay::triton_short", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def short_forward(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    """O of short sequences without prefix tokens, (B, O, N, L, d)."""
    out = empty_heads(q)
    launch = Launch(
        "short forward",
        (with_features_together(q), with_features_together(k), with_features_together(v), out),
        (),
        *others,
    )
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return out


@torch.library.custom_op(
    "spatial_decay::triton_short_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def short_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and numbers from that of O."""
    dq, dk, dv = (empty_heads(q) for _ in range(3))
    q, k, v, grad = (with_features_together(x) for x in (q, k, v, _within_reach(grad)))
    dnumbers = _empty_gradient(q, formula, numbers)
    launch = Launch("short backward", (q, k, v, grad, dq, dk, dv), (dnumbers,), formula, numbers, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return dq, dk, dv, summed_as(dnumbers, numbers)


@forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return empty_heads(q), _empty_lse(q)


@short_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return empty_heads(q)


@backward.register_fake
def _(grad, out, lse, *inputs):  # type: ignore[no-untyped-def]
    return _fake_gradients(*inputs)


@short_backward.register_fake
def _(grad, *inputs):  # type: ignore[no-untyped-def]
    return _fake_gradients(*inputs)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, formula: str, numbers: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return empty_heads(q), empty_heads(q), empty_heads(q), torch.empty(numbers.shape, device=numbers.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.formula, numbers, key_mask, positions, *ctx.options = inputs
    results = output if isinstance(output, tuple) else ()  # O and lse
    if results:
        ctx.mark_non_differentiable(results[1])
    ctx.save_for_backward(*results, q, k, v, numbers, key_mask, positions)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *results, q, k, v, numbers, key_mask, positions = ctx.saved_tensors
    differentiate = backward if results else short_backward
    inputs = q, k, v, ctx.formula, numbers, key_mask, positions, *ctx.options
    dq, dk, dv, dnumbers = differentiate(grad, *results, *inputs)
    return dq, dk, dv, None, dnumbers, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)
short_forward.register_autograd(_differentiate, setup_context=_save)


def _within_reach(grad: Tensor) -> Tensor:
    """The output's gradient, copied where the kernels cannot reach all of it: nobody can ask for its strides before."""
    return grad.contiguous() if reaches_too_far(grad.shape[3], grad.stride(3)) else grad


def _empty_lse(q: Tensor) -> Tensor:
    """One or two numbers a query, (1 or 2, B, O, N, L)."""
    return q.new_empty((1 + (q.dtype == torch.float32), *q.shape[:-1]), dtype=torch.float32)


def _empty_gradient(q: Tensor, formula: str, numbers: Tensor) -> Tensor:
    """Of numbers, but for each sequence, (num_numbers, B * O, N, L); zeros where no kernel writes them."""
    if FORMULAS[formula].num_numbers == 0:
        return torch.zeros_like(numbers)
    return numbers.new_empty((numbers.shape[0], q.shape[0] * q.shape[1], *q.shape[2:4]))
