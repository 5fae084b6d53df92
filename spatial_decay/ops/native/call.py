"""One call of the kernel: the tensors of an attention become the struct Problem of source/problem.h."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from spatial_decay.ops.attn_mask import limit_of
from spatial_decay.ops.formulas import FORMULAS
from spatial_decay.ops.native import library

__all__ = ["DTYPES", "MAX_HEAD_DIM", "Gradients", "Operands", "checked", "run"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MASK_DTYPES = {**DTYPES, torch.float64: 3, torch.bool: 4}
_FORMULAS = {name: number for number, name in enumerate(FORMULAS)}
MAX_HEAD_DIM = 256

# The fields of Problem in their order, as module struct writes their types: P a pointer, q an int64_t, d a double. All
# have 8 bytes, so that nothing lies between them. To pack them takes 0.5 us, a ctypes.Structure with arrays 10.
_FIELDS = {
    "q k v out grad dq dk dv": "P",
    "numbers dnumbers rows positions mask mask_tops": "P",
    "q_strides k_strides v_strides out_strides grad_strides dq_strides dk_strides dv_strides": "4q",
    "number_strides": "4q",
    "position_stride": "q",
    "mask_strides": "4q",
    "mask_top_strides": "3q",
    "batch lines heads length dim prefix height width": "q",
    "formula dtype mask_dtype threads": "q",
    "scale mask_limit max_step": "d",
}
_PROBLEM = struct.Struct("".join(code * len(names.split()) for names, code in _FIELDS.items()))
_NO_STRIDES: tuple[int, ...] = (0, 0, 0, 0)


class Operands(NamedTuple):
    """What both operators take, in the order of their schemas.

    Args:
        q: Queries, (B, N, L, d); or (B, O, N, L, d), the O rows or columns of a grid; any strides. O is 1 else.
        k: Keys, the same.
        v: Values, the same.
        formula: A name in ops/formulas.py.
        numbers: (M, B*O|1, N, L) float32, as its row there makes them; M is 0 without a decay.
        mask: (B*O|1, N|1, L|1, L), bool, True = may attend; or floating point, added to the scores; or None.
        mask_tops: Of tops_of, (B*O|1, N|1, L|1) float32; None of a bool mask.
        positions: Of position_table, (B|1, 3, L) of Positions; None of a grid.
        grid: H, W and P; 1, L and 0 of Positions.
        scale: Multiplies Q K^T.
        max_step: Of a Gaussian: distances along an axis count as this at most.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    formula: str
    numbers: Tensor
    mask: Tensor | None
    mask_tops: Tensor | None
    positions: Tensor | None
    grid: list[int]
    scale: float
    max_step: float


class Gradients(NamedTuple):
    """What the backward pass reads, dO as O, and writes: dQ, dK and dV as Q, dnumbers, (M, B*O, N, L), contiguous."""

    grad: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dnumbers: Tensor


def checked(operands: Operands) -> Operands:
    """The same. Anybody can call an operator of torch.library: what the kernel would read outside of raises.

    Raises:
        ValueError: shapes or dtypes are not those of Operands.
    """
    q, k, v, formula, numbers, mask, tops, positions, grid, _, _ = operands
    shape = q.shape
    if len(shape) not in (4, 5) or k.shape != shape or v.shape != shape or not 1 <= shape[-1] <= MAX_HEAD_DIM:
        _refuse(f"q, k and v of one shape, (B, N, L, d) or (B, O, N, L, d), d in 1 .. {MAX_HEAD_DIM}", q, k, v)
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        _refuse("q, k and v of one dtype, float32, bfloat16 or float16", q, k, v)
    num_heads, length = shape[-3:-1]
    count = shape[0] if len(shape) == 4 else shape[0] * shape[1]
    if formula not in FORMULAS:
        _refuse(f"a formula among {', '.join(FORMULAS)}, not {formula!r}")
    wanted = (FORMULAS[formula].num_numbers, numbers.shape[1] if numbers.ndim == 4 else 1, num_heads, length)
    if numbers.shape != wanted or wanted[1] not in (1, count) or numbers.dtype != torch.float32:
        _refuse(f"numbers of float32, ({wanted[0]}, {count} or 1, {num_heads}, {length})", numbers)
    if mask is not None:
        if mask.dtype not in _MASK_DTYPES or mask.ndim != 4 or not _broadcasts(mask, count, num_heads, length):
            _refuse("a mask, bool or floating point, (B*O|1, N|1, L|1, L)", mask)
        if mask.shape[3] != length:
            _refuse(f"a mask over L = {length} keys", mask)
    if (tops is not None) != (mask is not None and mask.dtype != torch.bool):
        _refuse("mask_tops with a mask of floating point, and with no other")
    if tops is not None and (
        tops.dtype != torch.float32 or tops.ndim != 3 or not _broadcasts(tops, count, num_heads, length)
    ):
        _refuse("mask_tops of float32, (B*O|1, N|1, L|1)", tops)
    if positions is None:
        if len(grid) != 3 or min(grid) < 0 or grid[0] * grid[1] + grid[2] != length:
            _refuse(f"a grid [H, W, P] with H * W + P = L = {length}, not {grid}")
    elif (
        positions.dtype != torch.float32
        or positions.shape not in ((count, 3, length), (1, 3, length))
        or not positions.is_contiguous()
        or len(shape) != 4
    ):
        _refuse(f"positions of float32, contiguous, ({count} or 1, 3, {length}), and no O", positions)
    return operands


def run(operands: Operands, out: Tensor, rows: Tensor, gradients: Gradients | None = None) -> None:
    """Call the kernel; operands are checked, and features lie beside each other in all tensors that have them.

    Args:
        operands: Read.
        out: O, as q; written forward, read backward.
        rows: (2, B, N, L) or (2, B, O, N, L) float32, contiguous: of each query the largest score and log2 of the sum
            of exponentials beside it; as out.
        gradients: Backward, what is read and written besides.

    Raises:
        MemoryError: there is no memory for scratch.
        RuntimeError: the threads of PyTorch could not be used.
    """
    q, k, v, formula, numbers, mask, tops, positions, grid, scale, max_step = operands
    if q.numel() == 0:
        return
    of_gradients, dnumbers, gradient_strides = _NO_STRIDES, 0, _NO_STRIDES * 4
    if gradients is not None:
        grad, dq, dk, dv, of_numbers = gradients
        of_gradients = (grad.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
        dnumbers = of_numbers.data_ptr()
        gradient_strides = (*_of_heads(grad), *_of_heads(dq), *_of_heads(dk), *_of_heads(dv))
    problem = _PROBLEM.pack(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *of_gradients),
        *(numbers.data_ptr(), dnumbers, rows.data_ptr()),
        *(0 if x is None else x.data_ptr() for x in (positions, mask, tops)),
        *(*_of_heads(q), *_of_heads(k), *_of_heads(v), *_of_heads(out), *gradient_strides),
        *(_shared(numbers) if len(numbers) else _NO_STRIDES),
        0 if positions is None or len(positions) == 1 else positions.stride(0),
        *(_NO_STRIDES if mask is None else _shared(mask)),
        *(_NO_STRIDES[:3] if tops is None else _shared(tops)),
        *(*(q.shape if q.ndim == 5 else (len(q), 1, *q.shape[1:])), grid[2], grid[0], grid[1]),
        *(_FORMULAS[formula], DTYPES[q.dtype], 0 if mask is None else _MASK_DTYPES[mask.dtype]),
        torch.get_num_threads(),
        *(scale, 0.0 if tops is None or mask is None else limit_of(mask.dtype), max_step),
    )
    code = library.kernel()(problem, library.parallel_for(), gradients is not None)
    if code == 1:
        raise MemoryError("backend 'native' found no memory for its scratch, some MB a thread. Use a smaller batch.")
    if code != 0:
        raise RuntimeError(f"backend 'native' could not use the threads of PyTorch (code {code}). Use backend='tiled'.")


def _of_heads(x: Tensor) -> tuple[int, ...]:
    """Strides of image, line, head and token."""
    strides = x.stride()
    return strides[:4] if len(strides) == 5 else (strides[0], 0, strides[1], strides[2])


def _shared(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 where there is only one and all share it."""
    return tuple([0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])


def _broadcasts(x: Tensor, *sizes: int) -> bool:
    """Whether the first dimensions have these sizes, or 1."""
    return all(size in (1, full) for size, full in zip(x.shape, sizes, strict=False))


def _refuse(wanted: str, *got: Tensor) -> None:
    found = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in got)
    raise ValueError(f"the operator spatial_decay::native needs {wanted}" + (f": got {found}." if found else "."))
