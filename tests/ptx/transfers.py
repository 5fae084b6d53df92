"""Instructions that move values: loads, stores, copies, between the threads of a warp, and within registers."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.kernel import DTYPES, Operation, Step
from tests.ptx.memory import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

__all__ = ["DECODERS"]

_LANES = np.arange(32)
_SHARED = ("shared", "shared::cta")


def _load(o: Operation) -> Step:
    if o.parts[1] == "param":
        return _load_parameter(o)
    is_shared, size = o.parts[1] in _SHARED, np.dtype(DTYPES[o.type]).itemsize
    numbers, unit, per_register = o.numbers(0), min(size, 4), max(1, size // 4)
    is_wide = [name.startswith("%rd") for name in o.names(0)]
    address = o.address(1, np.uint32 if is_shared else np.int64)
    assert is_shared or o.parts[1] == "global", o.text

    def step(m: "Machine") -> None:
        active = o.active(m)
        threads: Any = slice(None) if active is None else np.flatnonzero(active)
        at, count = address(m)[threads], len(numbers) * per_register
        if len(at) == 0:  # what is not loaded is not looked at, but may be moved
            loaded = np.zeros((count, 0), np.uint32 if unit == 4 else np.uint16)
        elif is_shared:
            loaded = m.shared.load(m.cta[threads], m.thread[threads], at, unit, count, o.text)
        else:
            loaded = m.memory.load(at, unit, count, o.text)
        if per_register == 2:
            loaded = loaded[::2].astype(np.uint64) | (loaded[1::2].astype(np.uint64) << np.uint64(32))
        for number, value, wide in zip(numbers, loaded, is_wide, strict=True):
            value = value.astype(np.uint64) if wide else value
            if active is not None:
                whole = np.zeros(m.num_threads, value.dtype)
                whole[threads] = value
                value = whole
            m.write(number, value, active)

    return step


def _load_parameter(o: Operation) -> Step:
    number, name, dtype = o.numbers(0)[0], o.operands[1].strip("[]"), DTYPES[o.type]
    is_wide = o.names(0)[0].startswith("%rd")

    def step(m: "Machine") -> None:
        value = m.params[name]
        if is_wide and value.dtype.itemsize == 4:  # a register may be wider than what it loads
            value = np.int64(value.view(dtype))
        m.write(number, m.full(value), o.active(m))

    return step


def _store(o: Operation) -> Step:
    is_shared, dtype = o.parts[1] in _SHARED, DTYPES[o.type]
    size = np.dtype(dtype).itemsize
    address = o.address(0, np.uint32 if is_shared else np.int64)
    gets = o.gets(1, {2: np.uint16, 4: np.uint32, 8: np.uint64}[size])
    assert is_shared or o.parts[1] == "global", o.text

    def step(m: "Machine") -> None:
        active = o.active(m)
        threads: Any = slice(None) if active is None else np.flatnonzero(active)
        at, values = address(m)[threads], [m.full(get(m))[threads] for get in gets]
        if len(at) == 0:
            return
        if size == 8:
            values = [part for value in values for part in np.ascontiguousarray(value).view(np.uint32).reshape(-1, 2).T]
        if is_shared:
            m.shared.store(m.cta[threads], m.thread[threads], at, min(size, 4), values, o.text)
        else:
            m.memory.store(at, min(size, 4), values, o.text)

    return step


def _copy(o: Operation) -> Step:
    """cp.async, its groups and the wait for them."""
    if "commit_group" in o.parts:
        return o.by_all(lambda m: m.shared.commit_copies())
    if "wait_group" in o.parts:
        num_left = int(o.operands[0], 0)
        return o.by_all(lambda m: m.shared.wait_for_copies(num_left))
    if "wait_all" in o.parts:

        def wait(m: "Machine") -> None:
            m.shared.commit_copies()
            m.shared.wait_for_copies(0)

        return o.by_all(wait)
    assert o.parts[1] == "async", o.text
    to, of, size = o.address(0, np.uint32), o.address(1, np.int64), int(o.operands[2], 0)
    num_bytes = o.get(3, np.int32) if len(o.operands) > 3 else None

    def step(m: "Machine") -> None:
        active = o.active(m)
        threads: Any = slice(None) if active is None else np.flatnonzero(active)
        target, source = to(m)[threads], of(m)[threads]
        if len(target) == 0:
            return
        count = np.full(len(target), size) if num_bytes is None else m.full(num_bytes(m))[threads]
        if not ((count == 0) | (count == size)).all():
            raise NotImplementedError("a part of a cp.async")
        data = np.zeros((size // 4, len(target)), np.uint32)  # of what is left out
        if (whole := np.flatnonzero(count)).size:
            data[:, whole] = m.memory.load(source[whole], 4, size // 4, o.text)
        m.shared.copy(m.cta[threads], m.thread[threads], target, data, o.text)

    return step


def _load_matrix(o: Operation) -> Step:
    """ldmatrix: 8 x 8 tiles of 2 bytes, the rows of tile n at the addresses of threads 8n .. 8n + 7."""
    numbers, address = o.numbers(0), o.address(1, np.uint32)

    def step(m: "Machine") -> None:
        rows = address(m).reshape(-1, 32)
        for tile, number in enumerate(numbers):
            if "trans" in o.parts:
                low, high = (
                    m.shared.load_halves(
                        *(m.cta, m.thread, rows[:, tile * 8 + _LANES % 4 * 2 + half].ravel()),
                        *(np.resize(_LANES // 4 * 2, m.num_threads), o.text),
                    ).astype(np.uint32)
                    for half in (0, 1)
                )
                value = low | (high << np.uint32(16))
            else:
                at = (rows[:, tile * 8 + _LANES // 4] + _LANES % 4 * 4).ravel()
                value = m.shared.load(m.cta, m.thread, at, 4, 1, o.text)[0]
            m.write(number, value)

    return o.by_all(step)


def _store_matrix(o: Operation) -> Step:
    """stmatrix: the inverse of ldmatrix."""
    address, gets = o.address(0, np.uint32), o.gets(1, np.uint32)

    def step(m: "Machine") -> None:
        rows = address(m).reshape(-1, 32)
        for tile, get in enumerate(gets):
            value = m.full(get(m))
            if "trans" in o.parts:
                for half in (0, 1):
                    at = (rows[:, tile * 8 + _LANES % 4 * 2 + half] + _LANES // 4 * 2).ravel()
                    bits = (value >> np.uint32(16 * half)).astype(np.uint16)
                    m.shared.store(m.cta, m.thread, at, 2, [bits], o.text)
            else:
                at = (rows[:, tile * 8 + _LANES // 4] + _LANES % 4 * 4).ravel()
                m.shared.store(m.cta, m.thread, at, 4, [value], o.text)

    return o.by_all(step)


def _shuffle(o: Operation) -> Step:
    """shfl.sync among all threads of a warp."""
    number, a, b, mode = o.numbers(0)[0], o.get(1, np.uint32), o.get(2, np.uint32), o.parts[2]
    assert "|" not in o.operands[0], o.text
    assert int(o.operands[3], 0) == 31, o.text
    assert int(o.operands[4], 0) in (-1, 0xFFFFFFFF), o.text

    def step(m: "Machine") -> None:
        values, by = m.full(a(m)).reshape(-1, 32), m.full(b(m)).reshape(-1, 32).astype(np.int64)
        source = {"bfly": _LANES ^ by, "idx": by & 31, "up": _LANES - by, "down": _LANES + by}[mode]
        source = np.where((source < 0) | (source > 31), _LANES, source)
        m.write(number, np.take_along_axis(values, source, 1).reshape(-1))

    return o.by_all(step)


def _move(o: Operation) -> Step:
    """mov, also of a register into parts, and of parts into one."""
    if o.operands[0].startswith("{"):
        return _unpack(o)
    if o.operands[1].startswith("{"):
        return _pack(o)
    dtype = np.uint16 if o.operands[0].startswith("%rs") else DTYPES[o.type]
    return o.elementwise(lambda a: a, dtype)


def _part(o: Operation, count: int) -> Any:
    """The dtype of one of count parts."""
    return {2: np.uint16, 4: np.uint32}[np.dtype(DTYPES[o.type]).itemsize // count]


def _unpack(o: Operation) -> Step:
    numbers, get = o.numbers(0), o.get(1, DTYPES[o.type])
    part = _part(o, len(numbers))

    def step(m: "Machine") -> None:
        parts = np.ascontiguousarray(m.full(get(m))).view(part).reshape(-1, len(numbers)).T
        for number, value in zip(numbers, parts, strict=True):
            m.write(number, value, o.active(m))

    return step


def _pack(o: Operation) -> Step:
    number, dtype = o.numbers(0)[0], DTYPES[o.type]
    gets = o.gets(1, _part(o, len(o.names(1))))

    def step(m: "Machine") -> None:
        parts: Array = np.stack([m.full(get(m)) for get in gets], 1)
        m.write(number, parts.view(dtype)[:, 0], o.active(m))

    return step


DECODERS = {
    "ld": _load, "st": _store, "cp": _copy, "ldmatrix": _load_matrix, "stmatrix": _store_matrix, "shfl": _shuffle,
    "mov": _move,
}  # fmt: skip
