"""Products on tensor cores: mma.sync of a warp, and wgmma of four warps, whose operands lie in shared memory.

Products are summed in float64 and rounded once to float32; how a GPU rounds in between is not documented.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.arithmetic import expand_half
from tests.ptx.kernel import Get, Operation, Step
from tests.ptx.memory import Array
from tests.ptx.shared import BASE

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

__all__ = ["DECODERS"]


def _of_warp(o: Operation) -> Step:
    """mma.sync: D = A B + C, where a thread holds the elements that PTX's documentation draws for each shape."""
    shape, dtype = o.parts[3], o.parts[7]
    assert o.parts[4:6] == ["row", "col"], o.text
    numbers, a_of, b_of, c_of = o.numbers(0), o.stack(1, np.uint32), o.stack(2, np.uint32), o.stack(3, np.float32)
    if (shape, dtype) not in [("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16")]:
        raise NotImplementedError(o.text)

    def step(m: "Machine") -> None:
        a, b, c = a_of(m).view(np.uint16), b_of(m).view(np.uint16), c_of(m)
        warps, steps = m.num_threads // 32, len(a) // 2  # of 8 elements of k
        a = a.reshape(steps, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * steps)
        b = b.reshape(steps, warps, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(warps, 8 * steps, 8)
        c = c.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        d = _product(a, b, dtype) + c
        d = d.astype(np.float32).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, m.num_threads)
        for number, value in zip(numbers, d, strict=True):
            m.write(number, value)

    return o.by_all(step)


def _product(a: Array, b: Array, dtype: str) -> Array:
    """Of bits of half precision, in float64."""
    a, b = (expand_half(np.ascontiguousarray(x), dtype).astype(np.float64) for x in (a, b))
    return np.matmul(a, b)


def _of_group(o: Operation) -> Step:
    """wgmma: the product, its groups, the wait for them, and the fence of registers."""
    if o.parts[1] == "fence":
        return o.by_all(lambda m: None)
    if o.parts[1] == "commit_group":

        def commit(m: "Machine") -> None:
            m.shared.commit_groups()
            m.unfinished.append([])

        return o.by_all(commit)
    if o.parts[1] == "wait_group":
        num_left = int(o.operands[0], 0)

        def wait(m: "Machine") -> None:
            m.shared.wait_for_groups(num_left)
            m.wait_for_results(num_left)

        return o.by_all(wait)
    return _group_product(o)


def _group_product(o: Operation) -> Step:
    """wgmma.mma_async: D = A B, or D + A B."""
    match, dtype, operands = re.fullmatch(r"m64n(\d+)k16", o.parts[4]), o.parts[6], o.operands
    if match is None or o.parts[5] != "f32" or dtype not in ("f16", "bf16") or operands[4:6] != ["1", "1"]:
        raise NotImplementedError(o.text)
    columns, numbers, adds = int(match.group(1)), o.numbers(0), o.get(3, np.bool_)
    has_registers = operands[1].startswith("{")
    is_turned = [text == "1" for text in operands[6:]]
    a_of = _tile_of_registers(o) if has_registers else _tile_of_shared(o, 1, 64, is_turned=is_turned[0])
    b_of = _tile_of_shared(o, 2, columns, is_turned=is_turned[-1])

    def step(m: "Machine") -> None:
        groups = m.num_threads // 128
        d = _product(a_of(m), b_of(m).transpose(0, 2, 1), dtype)  # (groups, 64, columns)
        add = m.full(adds(m))
        assert add.all() or not add.any()
        if add.all():
            c = m.accumulator(numbers, o.text).reshape(columns // 8, 2, 2, groups, 4, 8, 4)
            d = d + c.transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, 64, columns)
        d = d.astype(np.float32).reshape(groups, 4, 2, 8, columns // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        m.write_later(numbers, d.reshape(columns // 2, m.num_threads))

    return o.by_all(step)


def _tile_of_registers(o: Operation) -> Get:
    """A, (groups, 64, 16) of uint16."""
    stack = o.stack(1, np.uint32)

    def get(m: "Machine") -> Array:
        bits = stack(m).view(np.uint16).reshape(2, 2, m.num_threads // 32, 8, 4, 2)
        return bits.transpose(2, 1, 3, 0, 4, 5).reshape(m.num_threads // 128, 64, 16)

    return get


_WIDTHS, _SWIZZLES = (16, 128, 64, 32), (0, 7, 3, 1)  # bytes, and which bits are changed, by the descriptor's mode


def _tile_of_shared(o: Operation, index: int, rows: int, *, is_turned: bool) -> Get:
    """(groups, rows, 16) of uint16; a descriptor says where it starts, its strides and how it is swizzled."""
    descriptor_of = o.get(index, np.uint64)
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]

    def get(m: "Machine") -> Array:
        descriptors = m.full(descriptor_of(m)).reshape(-1, 128)
        if (descriptors != descriptors[:, :1]).any():
            m.note("a wgmma's descriptor differs within its group", o.text, 1)
        descriptor = descriptors[:, 0]
        start, leading, stride = (
            (((descriptor >> np.uint64(bit)) & np.uint64(0x3FFF)).astype(np.int64) * 16)[:, None, None]
            for bit in (0, 16, 32)
        )
        assert ((descriptor >> np.uint64(49)) & np.uint64(7) == 0).all(), "a base offset"
        mode = int(descriptor[0] >> np.uint64(62))
        width: Any = _WIDTHS[mode]
        if mode == 0:
            first, second = (row, column) if not is_turned else (column, row)
            by_row, by_column = (stride, leading) if not is_turned else (leading, stride)
            offset = first % 8 * 16 + first // 8 * by_row + second % 8 * 2 + second // 8 * by_column
        elif is_turned:
            half = width // 2
            offset = row % half * 2 + row // half * leading + column % 8 * width + column // 8 * stride
        else:
            offset = row % 8 * width + row // 8 * stride + column * 2
        address = start + offset
        address = address ^ (((address >> 7) & _SWIZZLES[mode]) << 4)
        return m.shared.read_by_group(m.cta.reshape(-1, 128)[:, :1, None], address - BASE, o.text)

    return get


DECODERS = {"mma": _of_warp, "wgmma": _of_group}
