"""Instructions on registers: numbers, bits, comparisons and conversions.

fma.rn is computed in float64 and rounded once more to float32: one result in about 2**29 differs. ex2.approx, div.full
and the like are rounded correctly, which on a GPU they need not be.
"""

from typing import Any

import numpy as np

from tests.ptx.kernel import DTYPES, Operation, Step
from tests.ptx.memory import Array

__all__ = ["DECODERS", "expand_half"]

_F32, _F64, _U16, _U32, _U64, _I32, _I64 = (
    *(np.float32, np.float64, np.uint16, np.uint32, np.uint64, np.int32, np.int64),
)


def expand_half(bits: Array, dtype: str) -> Array:
    """uint16 that are "f16" or "bf16" -> float32."""
    if dtype == "bf16":
        return (bits.astype(_U32) << _U32(16)).view(_F32)
    return bits.view(np.float16).astype(_F32)


def _rounded_to_half(x: Array, dtype: str) -> Array:
    """The inverse."""
    if dtype == "f16":
        return x.astype(np.float16).view(_U16)
    bits = np.ascontiguousarray(x).view(_U32)
    rounded = (bits + (_U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1)))) >> _U32(16)
    return np.where(np.isnan(x), _U16(0x7FFF), rounded.astype(_U16))


def _flushed(x: Array) -> Array:
    """0 in place of numbers below the smallest normal one."""
    return np.where(np.abs(x) < _F32(1.1754944e-38), np.copysign(_F32(0), x), x).astype(_F32)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return np.asarray(a.astype(_F64) * b + c).astype(_F32)


_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fused, "neg": np.negative, "abs": np.abs,
    "ex2": lambda a: np.exp2(a.astype(_F64)).astype(_F32),
    "lg2": lambda a: np.log2(a.astype(_F64)).astype(_F32),
    "rcp": lambda a: (1.0 / a.astype(_F64)).astype(_F32),
    "sqrt": lambda a: np.sqrt(a.astype(_F64)).astype(_F32),
    "rsqrt": lambda a: (1.0 / np.sqrt(a.astype(_F64))).astype(_F32),
    "div": lambda a, b: (np.asarray(a).astype(_F64) / b).astype(_F32),
}  # fmt: skip


def _calculation(o: Operation) -> Step:
    """add, sub, mul, mad, fma, div, rem, neg, abs, min, max, ex2, ... of floats or integers."""
    if o.type == "f32":
        return _of_floats(o)
    if o.type == "f32x2":
        return _of_pairs(o)
    return _of_integers(o)


def _of_floats(o: Operation) -> Step:
    name, count = o.parts[0], len(o.operands) - 1
    if name in ("max", "min"):
        keeps_nan, is_max = "NaN" in o.parts, name == "max"
        choose: Any = (np.maximum if is_max else np.minimum) if keeps_nan else (np.fmax if is_max else np.fmin)
        function = choose if count == 2 else (lambda a, b, c: choose(choose(a, b), c))
    else:
        function = _FLOAT[name]
    if "ftz" in o.parts:
        return o.elementwise(lambda *x: _flushed(function(*map(_flushed, x))), *[_F32] * count)
    return o.elementwise(function, *[_F32] * count)


def _of_pairs(o: Operation) -> Step:
    """Two floats in a register of 64 bits."""
    function, number, gets = _FLOAT[o.parts[0]], o.numbers(0)[0], [o.get(i, _U64) for i in range(1, len(o.operands))]
    assert "ftz" not in o.parts, o.text

    def step(m: Any) -> None:
        values = [np.array(m.full(get(m))).view(_F32) for get in gets]
        m.write(number, function(*values).view(_U64), o.active(m))

    return step


def _of_integers(o: Operation) -> Step:
    name, dtype = o.parts[0], DTYPES[o.type]
    if name in ("mul", "mad") and "wide" in o.parts:
        wide = DTYPES[o.type[0] + str(2 * int(o.type[1:]))]
        types, zero = [dtype, dtype] if name == "mul" else [dtype, dtype, wide], wide(0)
        return o.elementwise(lambda a, b, c=zero: a.astype(wide) * b.astype(wide) + c, *types)
    if name == "mul" and "hi" in o.parts:
        wide = _I64 if o.type == "s32" else _U64
        return o.elementwise(lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(dtype), dtype, dtype)
    if name in ("div", "rem"):
        return o.elementwise(lambda a, b: _divided(a, b, dtype, is_rest=name == "rem"), dtype, dtype)
    function, count = {
        "add": (np.add, 2), "sub": (np.subtract, 2), "mul": (np.multiply, 2), "mad": (lambda a, b, c: a * b + c, 3),
        "min": (np.minimum, 2), "max": (np.maximum, 2), "neg": (np.negative, 1), "abs": (np.abs, 1),
    }[name]  # fmt: skip
    return o.elementwise(function, *[dtype] * count)


def _divided(a: Array, b: Array, dtype: Any, *, is_rest: bool) -> Array:
    """Rounded towards 0."""
    if (np.asarray(b) == 0).any():
        raise ZeroDivisionError
    wide = _U64 if dtype is _U64 else _I64
    a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
    quotient = a // b if wide is _U64 else np.abs(a) // np.abs(b) * (np.sign(a) * np.sign(b))
    return (a - quotient * b if is_rest else quotient).astype(dtype)


_COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(o: Operation) -> Step:
    """setp; of floats one with NaN is false, or with a u behind its name true."""
    name, dtype = o.parts[1], DTYPES[o.type]
    if o.type != "f32":
        return o.elementwise(_COMPARE[name], dtype, dtype)

    def has_nan(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name in ("nan", "num"):
        return o.elementwise(lambda a, b: has_nan(a, b) == (name == "nan"), dtype, dtype)
    if name in _COMPARE:
        return o.elementwise(lambda a, b: _COMPARE[name](a, b) & ~has_nan(a, b), dtype, dtype)
    return o.elementwise(lambda a, b: _COMPARE[name[:-1]](a, b) | has_nan(a, b), dtype, dtype)


def _choice(o: Operation) -> Step:
    dtype = DTYPES[o.type]
    return o.elementwise(lambda a, b, c: np.where(c, a, b), dtype, dtype, np.bool_)


def _bitwise(o: Operation) -> Step:
    function: Any = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[o.parts[0]]
    return o.elementwise(function, *[DTYPES[o.type]] * (1 if o.parts[0] == "not" else 2))


def _shift(o: Operation) -> Step:
    """By as many bits as there are or more: 0, or the sign."""
    dtype = DTYPES[o.type]
    num_bits = 8 * np.dtype(dtype).itemsize
    is_signed = np.issubdtype(dtype, np.signedinteger)

    def function(a: Array, b: Array) -> Array:
        count = np.minimum(b, _U32(num_bits - 1)).astype(dtype)
        shifted = a << count if o.parts[0] == "shl" else a >> count
        return shifted if is_signed else np.where(b >= num_bits, dtype(0), shifted)

    return o.elementwise(function, dtype, _U32)


def _field(o: Operation) -> Step:
    """bfe: some bits out of 32."""
    dtype = DTYPES[o.type]
    if o.type == "u32":

        def function(a: Array, first: Array, count: Array) -> Array:
            first, count = np.minimum(first & _U32(255), _U32(63)), np.minimum(count & _U32(255), _U32(32))
            mask = (_U64(1) << count.astype(_U64)) - _U64(1)
            return ((a.astype(_U64) >> first.astype(_U64)) & mask).astype(_U32)

        return o.elementwise(function, dtype, _U32, _U32)
    first, count = int(o.operands[2]), int(o.operands[3])
    assert o.type == "s32", o.text
    assert first + count <= 32, o.text
    left, right = dtype(32 - first - count), dtype(32 - count)
    return o.elementwise(lambda a, *_: (a << left) >> right, dtype, _U32, _U32)


def _permutation(o: Operation) -> Step:
    """prmt: four bytes out of eight."""

    def function(a: Array, b: Array, selection: Array) -> Array:
        both, out = a.astype(_U64) | (b.astype(_U64) << _U64(32)), _U32(0)
        for index in range(4):
            one = (selection >> _U32(4 * index)) & _U32(15)
            byte = ((both >> ((one & _U32(7)).astype(_U64) * _U64(8))) & _U64(255)).astype(_U32)
            sign = np.where(byte & _U32(128), _U32(255), _U32(0))
            out = out | (np.where(one & _U32(8), sign, byte) << _U32(8 * index))
        return out

    assert o.parts[1:] == ["b32"], o.text
    return o.elementwise(function, _U32, _U32, _U32)


def _logic(o: Operation) -> Step:
    """lop3: any function of three bits, by its table."""
    table = int(o.operands[4], 0)

    def function(a: Array, b: Array, c: Array, _: Array) -> Array:
        out = _U32(0)
        for index in range(8):
            if table >> index & 1:
                out = out | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
        return out

    return o.elementwise(function, _U32, _U32, _U32, _U32)


def _conversion(o: Operation) -> Step:
    to, of = o.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        assert o.parts[1:-2] == ["rn"], o.text

        def pair(high: Array, low: Array) -> Array:
            high, low = (_rounded_to_half(x, half).astype(_U32) for x in (high, low))
            return (high << _U32(16)) | low

        return o.elementwise(pair, _F32, _F32)
    if to in ("bf16", "f16") and of == "f32":
        assert o.parts[1:-2] == ["rn"], o.text
        return o.elementwise(lambda a: _rounded_to_half(a, to), _F32)
    if to == "f32" and of in ("bf16", "f16"):
        return o.elementwise(lambda a: expand_half(a, of), _U16)
    if of == "f32":
        assert "rzi" in o.parts, o.text
        return o.elementwise(lambda a: np.trunc(np.asarray(a).astype(_F64)).astype(DTYPES[to]), _F32)
    return o.elementwise(lambda a: np.asarray(a).astype(DTYPES[to]), DTYPES[of])


DECODERS = {
    **dict.fromkeys(["add", "sub", "mul", "mad", "fma", "div", "rem", "neg", "abs", "min", "max"], _calculation),
    **dict.fromkeys(["ex2", "lg2", "rcp", "sqrt", "rsqrt"], _calculation),
    **dict.fromkeys(["and", "or", "xor", "not"], _bitwise),
    **dict.fromkeys(["shl", "shr"], _shift),
    "setp": _comparison, "selp": _choice, "bfe": _field, "prmt": _permutation, "lop3": _logic, "cvt": _conversion,
}  # fmt: skip
