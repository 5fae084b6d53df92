"""Backend `triton`: fused kernels for CUDA as torch.library operators, forward and backward, and what they can run.

Here tensors are allocated and kernels launched; the mathematics stands in triton_kernels.py (sequences of any length)
and triton_short.py (short ones). Memory beyond inputs, outputs and gradients is two numbers a token and head. Nothing
is added atomically: results repeat bit for bit. No second derivatives, no torch.func transforms.
"""

import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_decay.decay import GaussianDecay, ManhattanDecay, PairwiseDecay, PathDecay
from spatial_decay.grid import Grid
from spatial_decay.ops.inputs import Inputs, reasons_of_positions

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
    bias, mask, reasons = inputs.bias, inputs.attn_mask, []
    if inputs.q.dtype not in _DTYPES:
        reasons.append(f"{inputs.q.dtype} (needs float32, float16 or bfloat16)")
    if inputs.head_dim > _MAX_HEAD_DIM:
        reasons.append(f"head_dim={inputs.head_dim} (needs at most {_MAX_HEAD_DIM})")
    if inputs.dropout_p:
        reasons.append(f"dropout_p={inputs.dropout_p} (needs 0)")
    if inputs.scale <= 0:
        reasons.append(f"scale={inputs.scale} (needs one above 0)")
    if bias is not None and not isinstance(bias, _KINDS):
        reasons.append(f"{type(bias).__name__} (needs None or a {', '.join(kind.__name__ for kind in _KINDS)})")
    if isinstance(bias, PathDecay) and bias.causal:
        reasons.append("a causal PathDecay (needs causal=False)")
    reasons += reasons_of_positions(bias)
    if isinstance(bias, GaussianDecay) and isinstance(bias.grid, Grid) and max(bias.grid.size) - 1 > bias.max_distance:
        reasons.append(f"a grid wider than max_distance={bias.max_distance} (needs one within it)")
    if mask is not None and mask.requires_grad:
        reasons.append("attn_mask requires grad (needs one without)")
    if inputs.is_exporting_to_onnx:
        reasons.append("torch.onnx.export traces, and ONNX has no such operator (needs PyTorch)")
    if mask is not None and mask.shape[2] > 1:
        reasons.append("attn_mask differs from query to query (needs one over keys, (B, 1, 1, L))")
    if inputs.is_inside_torch_func:
        reasons.append("inside a torch.func transform (needs none)")
    return reasons


def avoid_reasons(inputs: Inputs) -> list[str]:
    """Where others are faster, and where the program is to leave Python."""
    if inputs.q.device.type == "cpu":
        return ["on cpu it runs in Triton's interpreter, which is for tests"]
    if inputs.is_exporting:
        return ["torch.export: the program would need this package"]
    return ["without a decay PyTorch's own kernels are faster"] if inputs.bias is None else []


def attention(inputs: Inputs) -> Tensor:
    """softmax(scale * Q K^T + M) V (SDT Eq. 10), in the dtype and shape of q."""
    q, k, v = (x if x.ndim == 5 else x[:, None] for x in (inputs.q, inputs.k, inputs.v))  # (B, O, N, L, d)
    kind, tokens = _lowered(inputs.bias, q)
    grid = Grid(1, inputs.length) if inputs.bias is None else inputs.bias.grid
    assert isinstance(grid, Grid)
    arguments = (q, k, v, tokens, inputs.attn_mask, [*grid.size, grid.num_prefix_tokens], kind, inputs.scale)
    is_short = inputs.length <= _longest_short(inputs.head_dim) and not grid.num_prefix_tokens and kind != "gaussian"
    out = _short_forward(*arguments) if is_short else _forward(*arguments)[0]
    return out if inputs.q.ndim == 5 else out[:, 0]


def _lowered(bias: PairwiseDecay | None, q: Tensor) -> tuple[str, Tensor]:
    """The kernels' name of the kind, and its numbers of each token, (numbers, S|1, N, L) float32."""
    if bias is None:
        return "none", torch.zeros((), dtype=torch.float32, device=q.device).expand(1, 1, *q.shape[2:4])
    tokens = tuple(token.to(torch.float32) for token in bias.tokens)
    if isinstance(bias, GaussianDecay):
        amplitude, variance_h, variance_w = tokens
        return "gaussian", torch.stack([amplitude, 0.5 / variance_h, 0.5 / variance_w])
    return "manhattan" if isinstance(bias, ManhattanDecay) else "path", tokens[0][None]


def _longest_short(head_dim: int) -> int:
    """Up to this length a whole sequence fits into the registers of a program, forward and backward."""
    return 64 if head_dim <= 64 else 32


# Schemas are spelt out, and what torch calls back is left untyped, as in tiled.py.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor tokens, Tensor? key_bias, SymInt[] grid, str kind, float scale"


@torch.library.custom_op("spatial_decay::triton", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, key_bias: Tensor | None, grid: list[int], kind: str, scale: float
) -> tuple[Tensor, Tensor]:
    """O, (B, O, N, L, d), and lse, (B, O, N, L), of sequences of any length.

    q, k, v: (B, O, N, L, d). tokens: (numbers, B*O|1, N, L). key_bias: (B*O|1, N|1, 1, L). grid: H, W and P.
    """
    out, lse = _empty_like(q), _empty_rows(q)
    q, k, v = (_dense(x) for x in (q, k, v))
    call = _Call((q, k, v, out), tokens, key_bias, grid, kind, scale)
    tiles = _tiles("forward", q, kind)
    with torch.cuda.device_of(q):
        _kernels().long.forward[call.num_programs(tiles.queries)](
            q, k, v, out, lse, tokens, call.key_bias, call.positions,
            *call.sizes(q, k, v, out), **call.options(tiles, tiles.keys),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op(
    "spatial_decay::triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    key_bias: Tensor | None,
    grid: list[int],
    kind: str,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and tokens from that of O."""
    dq, dk, dv = (_empty_like(q) for _ in range(3))
    q, k, v, grad = (_dense(x) for x in (q, k, v, grad))
    delta, dtokens = torch.empty_like(lse), _empty_token_gradient(q, tokens)
    call = _Call((q, k, v, out, grad, dq, dk, dv), tokens, key_bias, grid, kind, scale)
    rows, columns = _tiles("rows", q, kind), _tiles("columns", q, kind)
    with torch.cuda.device_of(q):
        _kernels().long.backward_rows[call.num_programs(rows.queries)](
            q, k, v, out, grad, dq, lse, delta, tokens, dtokens, call.key_bias, call.positions,
            *call.sizes(q, k, v, out, grad, dq), **call.options(rows, rows.keys),
        )  # fmt: skip
        _kernels().long.backward_columns[call.num_programs(columns.keys)](
            q, k, v, grad, dk, dv, lse, delta, tokens, dtokens, call.key_bias, call.positions,
            *call.sizes(q, k, v, grad, dk, dv), **call.options(columns, columns.queries),
        )  # fmt: skip
    return dq, dk, dv, _summed_as(dtokens, tokens)


@torch.library.custom_op("spatial_decay::triton_short", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _short_forward(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, key_bias: Tensor | None, grid: list[int], kind: str, scale: float
) -> Tensor:
    """O of short sequences without prefix tokens."""
    out = _empty_like(q)
    q, k, v = (_dense(x) for x in (q, k, v))
    call = _Call((q, k, v, out), tokens, key_bias, grid, kind, scale)
    with torch.cuda.device_of(q):
        _kernels().short.forward[call.num_programs(q.shape[3])](
            q, k, v, out, tokens, call.key_bias, call.positions,
            *call.sizes(q, k, v, out), **call.short_options(),
        )  # fmt: skip
    return out


@torch.library.custom_op(
    "spatial_decay::triton_short_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _short_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    key_bias: Tensor | None,
    grid: list[int],
    kind: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and tokens from that of O."""
    dq, dk, dv = (_empty_like(q) for _ in range(3))
    q, k, v, grad = (_dense(x) for x in (q, k, v, grad))
    dtokens = _empty_token_gradient(q, tokens)
    call = _Call((q, k, v, grad, dq, dk, dv), tokens, key_bias, grid, kind, scale)
    with torch.cuda.device_of(q):
        _kernels().short.backward[call.num_programs(q.shape[3])](
            q, k, v, grad, dq, dk, dv, tokens, dtokens, call.key_bias, call.positions,
            *call.sizes(q, k, v, grad, dq, dk, dv), **call.short_options(),
        )  # fmt: skip
    return dq, dk, dv, _summed_as(dtokens, tokens)


@_forward.register_fake
def _(q, k, v, tokens, key_bias, grid, kind, scale):  # type: ignore[no-untyped-def]
    return _empty_like(q), _empty_rows(q)


@_short_forward.register_fake
def _(q, k, v, tokens, key_bias, grid, kind, scale):  # type: ignore[no-untyped-def]
    return _empty_like(q)


@_backward.register_fake
@_short_backward.register_fake
def _(grad, q, k, v, tokens, *others):  # type: ignore[no-untyped-def]
    return _empty_like(q), _empty_like(q), _empty_like(q), torch.empty(tokens.shape, device=tokens.device)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.grid, ctx.kind, ctx.scale = inputs
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        tensors += output
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *tensors, out, lse = ctx.saved_tensors
    gradients = _backward(grad, *tensors, ctx.grid, ctx.kind, ctx.scale, out, lse)
    return *gradients, None, None, None, None


def _differentiate_short(ctx, grad):  # type: ignore[no-untyped-def]
    gradients = _short_backward(grad, *ctx.saved_tensors, ctx.grid, ctx.kind, ctx.scale)
    return *gradients, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_short_forward.register_autograd(_differentiate_short, setup_context=_save)


class _Tiles(NamedTuple):
    """How many queries and keys a program takes at a time, by how many warps, loading how many steps ahead."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def _tiles(step: str, q: Tensor, kind: str) -> _Tiles:
    """From a table, not from timing at the first call: that may differ from run to run, and with it the last bits.

    The largest tiles that no kernel spills registers for, compiled for compute capability 8.0 and 9.0
    (tests/ops/triton_instructions.py): the fewer tiles, the less often is the other side loaded. float32 multiplies
    without tensor cores, and its tiles take twice the space; the Gaussian sums three slopes a query instead of one.
    """
    is_wide = q.shape[-1] > 64
    if q.dtype == torch.float32:
        return _Tiles(32, 32, 8 if is_wide else 4, 2)
    if step == "forward":
        return _Tiles(128, 64, 8, 2) if is_wide else _Tiles(128, 128, 8, 2)
    if kind == "gaussian":
        return _Tiles(32 if is_wide else 64, 64, 4, 2)
    if step == "rows":
        return _Tiles(64, 64, 4, 2) if is_wide else _Tiles(128, 64, 8, 2)
    return _Tiles(32, 64, 4, 2) if is_wide else _Tiles(64, 128, 8, 2)


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self,
        features: Sequence[Tensor],
        tokens: Tensor,
        key_bias: Tensor | None,
        grid: list[int],
        kind: str,
        scale: float,
    ) -> None:
        q = features[0]
        batch_size, num_outer, num_heads, self.length, self.head_dim = q.shape
        self.num_sequences, self.num_prefix = batch_size * num_outer * num_heads, grid[2]
        self.positions = _positions(grid, q.device)
        self.key_bias = tokens if key_bias is None else key_bias  # not read where there is none
        key_bias_strides = (0, 0, 0, 0) if key_bias is None else (0, *_strides(key_bias[:, :, 0]))
        self.others = (_strides(tokens), key_bias_strides, num_outer, num_heads, self.length, scale)
        unit = 16 // q.element_size()
        self.unit = unit if all(stride % unit == 0 for x in features for stride in _strides(x)[:-1]) else 1
        first, rest = _parts(self.head_dim)
        self.constants: dict[str, Any] = {
            "KIND": ("none", "manhattan", "path", "gaussian").index(kind),
            "HAS_KEY_BIAS": key_bias is not None,
            "D": self.head_dim,
            "UNIT": self.unit,
            "D1": first,
            "D2": rest,
            "UPCAST": _kernels().are_interpreted and q.dtype == torch.bfloat16,
            "enable_fp_fusion": True,  # a product and a sum in one instruction
        }

    def sizes(self, *features: Tensor) -> tuple[Any, ...]:
        """What the kernels take behind the tensors: the strides of these, whose features are dense, and all others."""
        strides = (tuple(stride // self.unit for stride in _strides(x)[:-1]) for x in features)
        return *strides, *self.others

    def num_programs(self, block: int) -> tuple[int]:
        """One for each block of each sequence."""
        return (self.num_sequences * -(-self.length // block),)

    def options(self, tiles: _Tiles, step: int) -> dict[str, Any]:
        """For the kernels that walk over a long sequence in steps of so many tokens; the last one is as small as can be."""
        rest = (self.length - self.num_prefix) % step
        return self.constants | {
            "NUM_PREFIX": self.num_prefix,
            "PREFIX_BLOCK": min(64, max(16, _power_of_two(self.num_prefix))),
            "BLOCK_Q": tiles.queries,
            "BLOCK_K": tiles.keys,
            "TAIL_BLOCK": 0 if rest == 0 else max(16, _power_of_two(rest)),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def short_options(self) -> dict[str, Any]:
        """For the kernels that hold a whole sequence, by as few warps as can: none waits for another then."""
        block = max(16, _power_of_two(self.length))
        return self.constants | {"BLOCK": block, "num_warps": 4 if block >= 64 else 1}


@cache
def _kernels() -> SimpleNamespace:
    """The kernels, imported at the first use because Triton is large, and whether they run in its interpreter."""
    import triton

    from spatial_decay.ops import triton_kernels, triton_short

    are_interpreted = not isinstance(triton_kernels.forward, triton.runtime.JITFunction)
    return SimpleNamespace(long=triton_kernels, short=triton_short, are_interpreted=are_interpreted)


def _positions(grid: list[int], device: torch.device) -> Tensor:
    """h and w of each token, (2, L) float32. What is made while a CUDA graph is captured is empty yet, and not kept."""
    height, width, num_prefix = grid
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _new_positions(height, width, num_prefix, device)
    return _kept_positions(height, width, num_prefix, device)


@lru_cache(maxsize=64)
def _kept_positions(height: int, width: int, num_prefix: int, device: torch.device) -> Tensor:
    """Kept, because reading a table is cheaper than dividing by W for each score, and making one is five launches."""
    positions = _new_positions(height, width, num_prefix, device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams will read it too
    return positions


def _new_positions(height: int, width: int, num_prefix: int, device: torch.device) -> Tensor:
    positions = Grid(height, width).positions(device=device, dtype=torch.float32)
    return F.pad(torch.stack(positions), (num_prefix, 0))


def _parts(head_dim: int) -> tuple[int, int]:
    """head_dim as a power of two and a rest of 16 or more, 72 = 64 + 16; or as one where that is no larger."""
    whole = max(16, _power_of_two(head_dim))
    rest = max(16, _power_of_two(head_dim - whole // 2))
    return (whole, 0) if head_dim <= 16 or whole // 2 + rest >= whole else (whole // 2, rest)


def _power_of_two(n: int) -> int:
    """The smallest that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def _dense(x: Tensor) -> Tensor:
    """x with neighbouring features beside each other in memory; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


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


def _empty_token_gradient(q: Tensor, tokens: Tensor) -> Tensor:
    """(numbers, S, N, L), float32."""
    return tokens.new_empty((tokens.shape[0], q.shape[0] * q.shape[1], *q.shape[2:4]))


def _summed_as(dtokens: Tensor, tokens: Tensor) -> Tensor:
    """Over the sequences where they share their tokens."""
    return dtokens.sum(1, keepdim=True) if tokens.shape[1] == 1 and dtokens.shape[1] > 1 else dtokens


def _strides(x: Tensor) -> tuple[int, ...]:
    """0 where there is only one: then all share it, and Triton compiles no kernel of its own for a stride of 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
