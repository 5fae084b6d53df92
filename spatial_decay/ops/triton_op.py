"""Backend `triton`: fused kernels for CUDA as torch.library operators, forward and backward, and what they can run.

Here tensors are allocated and kernels launched, as triton_call.py and triton_schedule.py say; the mathematics stands in
triton_kernels.py (sequences of any length) and triton_short.py (short ones). Memory beyond inputs, outputs and their
gradients is two numbers a token and head. Nothing is added atomically: results repeat bit for bit. No second
derivatives, no torch.func transforms.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from spatial_decay.decay import GaussianDecay, ManhattanDecay, PairwiseDecay, PathDecay
from spatial_decay.layout import Grid, Layout
from spatial_decay.ops.inputs import Inputs
from spatial_decay.ops.triton_call import Launch, dense, is_short, positions_of

__all__ = ["attention", "avoid_reasons", "unsupported_reasons"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = (ManhattanDecay, PathDecay, GaussianDecay)
_MAX_HEAD_DIM = 128
_OLDEST_TRITON = (3, 3)  # the kernels take strides as tuples


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
    gpu = torch.cuda.get_device_properties(device)
    return [] if gpu.major >= 8 else [f"compute capability {gpu.major}.{gpu.minor} (needs 8.0 or newer)"]


def _reasons_of_the_inputs(inputs: Inputs) -> list[str]:
    decay, mask, reasons = inputs.decay, inputs.attn_mask, []
    if inputs.q.dtype not in _DTYPES:
        reasons.append(f"{inputs.q.dtype} (needs float32, float16 or bfloat16)")
    if inputs.head_dim > _MAX_HEAD_DIM:
        reasons.append(f"head_dim={inputs.head_dim} (needs at most {_MAX_HEAD_DIM})")
    if inputs.dropout_p:
        reasons.append(f"dropout_p={inputs.dropout_p} (needs 0)")
    if inputs.scale <= 0:
        reasons.append(f"scale={inputs.scale} (needs one above 0)")
    if decay is not None and not isinstance(decay, _KINDS):
        reasons.append(f"{type(decay).__name__} (needs None or a {', '.join(kind.__name__ for kind in _KINDS)})")
    if isinstance(decay, PathDecay) and decay.causal:
        reasons.append("a causal PathDecay (needs causal=False)")
    if isinstance(decay, GaussianDecay) and decay.layout.largest_step > decay.max_distance:
        reasons.append(f"{decay.layout} with max_distance={decay.max_distance} (needs a Grid within it, or none)")
    if mask is not None and mask.requires_grad:
        reasons.append("attn_mask requires grad (needs one without)")
    if inputs.is_exporting_to_onnx:
        reasons.append("torch.onnx.export traces, and ONNX has no such operator (needs PyTorch)")
    if _reaches_too_far(inputs):
        reasons.append("the tokens of one sequence lie 2**31 or more elements apart (needs fewer, for 32-bit offsets)")
    if mask is not None and mask.shape[2] > 1:
        reasons.append("attn_mask differs from query to query (needs one over keys, (B, 1, 1, L))")
    if inputs.is_inside_torch_func:
        reasons.append("inside a torch.func transform (needs none)")
    return reasons


def _reaches_too_far(inputs: Inputs) -> bool:
    """Within a sequence; not asked of sizes that vary, on which a compiler would make it a condition."""
    if torch.compiler.is_compiling():
        return False
    return max(x.stride(-2) for x in (inputs.q, inputs.k, inputs.v)) * inputs.length >= 2**31


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Where others are faster, and where the program is to leave Python."""
    if inputs.q.device.type == "cpu":
        return ["on cpu it runs in Triton's interpreter, which is for tests"]
    if inputs.is_exporting:
        return ["torch.export: the program would need this package"]
    return ["without a decay PyTorch's own kernels are faster"] if inputs.decay is None else []


def attention(inputs: Inputs, *, tunes: bool = False) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in the dtype and shape of q; tunes: see triton_autotune.py."""
    q, k, v = (x if x.ndim == 5 else x[:, None] for x in (inputs.q, inputs.k, inputs.v))  # (B, O, N, L, d)
    kind, tokens = _lowered(inputs.decay, q)
    layout: Layout = Grid(1, inputs.length) if inputs.decay is None else inputs.decay.layout
    arguments = (
        *(q, k, v, kind, tokens, inputs.attn_mask, positions_of(layout, kind, q)),
        *(layout.num_prefix_tokens, inputs.scale, tunes),
    )
    out = _short_forward(*arguments) if is_short(q, kind, layout) else _forward(*arguments)[0]
    return out if inputs.q.ndim == 5 else out[:, 0]


def _lowered(decay: PairwiseDecay | None, q: Tensor) -> tuple[str, Tensor]:
    """The kernels' name of the kind, and its numbers of each token, (numbers, S|1, N, L) float32."""
    if decay is None:
        return "none", torch.zeros((), dtype=torch.float32, device=q.device).expand(1, 1, *q.shape[2:4])
    tokens = tuple(token.to(torch.float32) for token in decay.numbers)
    if isinstance(decay, GaussianDecay):
        amplitude, variance_h, variance_w = tokens
        return "gaussian", torch.stack([amplitude, 0.5 / variance_h, 0.5 / variance_w])
    return "manhattan" if isinstance(decay, ManhattanDecay) else "path", tokens[0][None]


# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py. What an operator does not look at
# itself, it hands on to Launch, whose arguments come in the same order.
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str kind, Tensor tokens, Tensor? key_bias, Tensor positions, int num_prefix, "
    "float scale, bool tunes"
)


@torch.library.custom_op("spatial_decay::triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(q: Tensor, k: Tensor, v: Tensor, kind: str, tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """O, (B, O, N, L, d), and lse, (B, O, N, L), of sequences of any length."""
    out, lse = _empty_like(q), _empty_rows(q)
    q, k, v = (dense(x) for x in (q, k, v))
    launch = Launch("forward", (q, k, v, out), (lse,), kind, tokens, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return out, lse


@torch.library.custom_op(
    "spatial_decay::triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: str, tokens: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and tokens from that of O."""
    dq, dk, dv = (_empty_like(q) for _ in range(3))
    q, k, v, grad = (dense(x) for x in (q, k, v, grad))
    numbers = lse, torch.empty_like(lse), _empty_token_gradient(q, kind, tokens)  # the second is delta
    rows = Launch("rows", (q, k, v, out, grad, dq), numbers, kind, tokens, *others)
    columns = Launch("columns", (q, k, v, grad, dk, dv), numbers, kind, tokens, *others)
    with torch.cuda.device_of(q):
        # Both schedules first: whenever columns runs, also to be timed, it adds to what rows wrote.
        of_rows, of_columns = rows.schedule(), columns.schedule()
        rows(of_rows)
        columns(of_columns)
    return dq, dk, dv, _summed_as(numbers[2], tokens)


@torch.library.custom_op("spatial_decay::triton_short", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _short_forward(q: Tensor, k: Tensor, v: Tensor, kind: str, tokens: Tensor, *others: Any) -> Tensor:
    """O of short sequences without prefix tokens."""
    out = _empty_like(q)
    q, k, v = (dense(x) for x in (q, k, v))
    launch = Launch("short forward", (q, k, v, out), (), kind, tokens, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return out


@torch.library.custom_op(
    "spatial_decay::triton_short_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _short_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: str, tokens: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and tokens from that of O."""
    dq, dk, dv = (_empty_like(q) for _ in range(3))
    q, k, v, grad = (dense(x) for x in (q, k, v, grad))
    dtokens = _empty_token_gradient(q, kind, tokens)
    launch = Launch("short backward", (q, k, v, grad, dq, dk, dv), (dtokens,), kind, tokens, *others)
    with torch.cuda.device_of(q):
        launch(launch.schedule())
    return dq, dk, dv, _summed_as(dtokens, tokens)


@_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return _empty_like(q), _empty_rows(q)


@_short_forward.register_fake
def _(q, *others):  # type: ignore[no-untyped-def]
    return _empty_like(q)


@_backward.register_fake
def _(grad, out, lse, *inputs):  # type: ignore[no-untyped-def]
    return _fake_gradients(*inputs)


@_short_backward.register_fake
def _(grad, *inputs):  # type: ignore[no-untyped-def]
    return _fake_gradients(*inputs)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, kind: str, tokens: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _empty_like(q), _empty_like(q), _empty_like(q), torch.empty(tokens.shape, device=tokens.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.kind, tokens, key_bias, positions, *ctx.options = inputs
    results = output if isinstance(output, tuple) else ()  # O and lse
    if results:
        ctx.mark_non_differentiable(results[1])
    ctx.save_for_backward(*results, q, k, v, tokens, key_bias, positions)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *results, q, k, v, tokens, key_bias, positions = ctx.saved_tensors
    differentiate = _backward if results else _short_backward
    dq, dk, dv, dtokens = differentiate(grad, *results, q, k, v, ctx.kind, tokens, key_bias, positions, *ctx.options)
    return dq, dk, dv, None, dtokens, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_short_forward.register_autograd(_differentiate, setup_context=_save)


def _empty_like(q: Tensor) -> Tensor:
    """(B, O, N, L, d) with all features of a token together in memory, as the output projection wants them.

    Columns, (B, W, N, H, d), lie as maps (B, H, W, N, d) do: see to_columns.
    """
    order = (0, 3, 1, 2, 4) if q.stride(3) > q.stride(1) else (0, 1, 3, 2, 4)
    new = q.new_empty([q.shape[i] for i in order])
    return new.permute([order.index(i) for i in range(5)])


def _empty_rows(q: Tensor) -> Tensor:
    """A number a query, (B, O, N, L)."""
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def _empty_token_gradient(q: Tensor, kind: str, tokens: Tensor) -> Tensor:
    """(numbers, S, N, L), float32; zeros where there is no decay, since no kernel writes them."""
    if kind == "none":
        return torch.zeros_like(tokens)
    return tokens.new_empty((tokens.shape[0], q.shape[0] * q.shape[1], *q.shape[2:4]))


def _summed_as(dtokens: Tensor, tokens: Tensor) -> Tensor:
    """Over the sequences where they share their tokens."""
    return dtokens.sum(1, keepdim=True) if tokens.shape[1] == 1 and dtokens.shape[1] > 1 else dtokens
