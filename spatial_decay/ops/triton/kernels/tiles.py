"""What all Triton kernels share: their arguments, and loading, storing and multiplying tiles."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Of a row's scores times log2(e), instead of -inf, so that -inf - peak is no NaN. A peak is rounded, and the product
# from which it is subtracted is not, in one instruction: of -1e10 that leaves 2^500 for the largest weight.
LOWEST_PEAK = tl.constexpr(-(2.0**24))


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    FORMULA: Any  # by name
    NUM_NUMBERS: Any  # of each token that the formula reads: none, 1 or 3
    READS_KEYS: Any  # whether it reads the first number of the key too
    HAS_KEY_MASK: Any
    HAS_FLAGS: Any  # tokens that lie nowhere may be anywhere
    NUM_PREFIX: Any
    D: Any  # head_dim, which is cut into two:
    D1: Any  # a power of two,
    D2: Any  # and a rest, 0 if there is none: 72 costs 64 + 16
    BLOCK_Q: Any
    BLOCK_K: Any
    REST_BLOCK: Any  # of the end of the walk, over prefix tokens and what fills no block; 0 if there is none
    UNIT: Any  # of the strides of features, in elements
    UPCAST: Any  # see dot


class Call(NamedTuple):
    """The tensors and sizes of one launch; a tensor comes with its strides, but for those of the last dimension."""

    features: Any  # (B, O, N, L, d) each
    rows: Any  # contiguous (numbers, S, N, L) each, S = B * O, or None
    numbers: Any  # (numbers, S, N, L), and the stride of L
    key_mask: Any  # (S, N, L), and the stride of L
    positions: Any  # (B, 2 or 3, L)
    num_outer: Any  # O
    num_heads: Any
    length: Any
    scale: Any  # of the scores within exp2; times the factor it is the caller's
    factor: Any  # of q or k, which are multiplied by it beforehand: see scaled


class Place(NamedTuple):
    """What a program works on: its block of tokens, and image, line of the grid and head, in 64 bits."""

    block: Any
    image: Any
    line: Any
    head: Any
    row: Any  # where the sequence starts in a contiguous (S, N, L)


class Features(NamedTuple):
    """Where the features of a sequence start, and the stride from token to token."""

    start: Any
    stride: Any


class Sequence(NamedTuple):
    """Where the numbers, positions and key mask of a sequence start, with strides; and two sizes."""

    numbers: Any
    number_stride: Any
    token_stride: Any
    positions: Any
    key_mask: Any
    key_mask_stride: Any
    length: Any
    scale: Any


@triton.jit
def load_row(address, mask, MASKED: tl.constexpr):
    """As float32; 0 where the mask is false."""
    if MASKED:
        return tl.load(address, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(address).to(tl.float32)


# Features: two parts, as wide as D1 and D2.


@triton.jit
def _load_part(features, index, stop, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, const):
    """WIDTH features from FIRST on of the tokens in index, (len(index), WIDTH); 0 past D and, if MASKED, past stop."""
    column = FIRST + tl.arange(0, WIDTH)
    address = features.start + index[:, None] * features.stride + column[None, :]
    if MASKED:
        return tl.load(address, mask=(index < stop)[:, None] & (column < const.D)[None, :], other=0.0)
    elif FIRST + WIDTH > const.D:
        return tl.load(address, mask=(column < const.D)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def load_features(features, index, stop, MASKED: tl.constexpr, const):
    """Both parts of the features; the first one twice where there is no rest."""
    first = _load_part(features, index, stop, 0, const.D1, MASKED, const)
    if const.D2 > 0:
        return first, _load_part(features, index, stop, const.D1, const.D2, MASKED, const)
    else:
        return first, first


@triton.jit
def scaled(features, factor):
    """Both parts times a factor; only of float32, see launch.split_scale."""
    if features[0].dtype == tl.float32:
        return features[0] * factor, features[1] * factor
    else:
        return features


@triton.jit
def store_features(features, index, stop, first, rest, const):
    """The inverse of load_features, in the dtype of the memory."""
    column = tl.arange(0, const.D1)
    address = features.start + index[:, None] * features.stride + column[None, :]
    mask = (index < stop)[:, None]
    tl.store(address, first.to(features.start.dtype.element_ty), mask=mask & (column < const.D)[None, :])
    if const.D2 > 0:
        column = const.D1 + tl.arange(0, const.D2)
        address = features.start + index[:, None] * features.stride + column[None, :]
        tl.store(address, rest.to(features.start.dtype.element_ty), mask=mask & (column < const.D)[None, :])


@triton.jit
def dot(a, b, const):
    """a @ b in float32. UPCAST is for the interpreter, which multiplies the bit patterns of bfloat16."""
    if const.UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b, const):
    """total + a @ b."""
    if const.UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def dot_features(a, b, const):
    """The dot product of all pairs of a's and b's rows, over both parts."""
    out = dot(a[0], tl.trans(b[0]), const)
    if const.D2 > 0:
        out = add_dot(out, a[1], tl.trans(b[1]), const)
    return out


# Where a program's tokens are in memory.


@triton.jit
def place_of(call, num_blocks):
    """The program's own."""
    program = tl.program_id(0)
    block = program % num_blocks
    sequence = (program // num_blocks).to(tl.int64)
    head = sequence % call.num_heads
    line = sequence // call.num_heads % call.num_outer
    image = sequence // call.num_heads // call.num_outer
    row = ((image * call.num_outer + line) * call.num_heads + head) * call.length
    return Place(block, image, line, head, row)


@triton.jit
def features_at(tensor, place, const):
    """Those of the program's sequence, of a tensor (B, O, N, L, d) with its strides.

    These come in units of 16 bytes where they can: Triton sees by itself that a number is divisible by 16, but not by
    8, and with head_dim 72 it would load 2 bytes at a time instead of 16.
    """
    start, image, line, head, token = tensor
    # The place is in 64 bits, and before the unit: strides of 2**31 elements and more come in units of 32 bits.
    offset = (place.image * image + place.line * line + place.head * head) * const.UNIT
    return Features(start + offset, token * const.UNIT)


@triton.jit
def sequence_at(call, place, const):
    """The program's sequence; the stride of what all sequences share is 0."""
    numbers, number_stride, sequence_stride, head_stride, token_stride = call.numbers
    key_mask, mask_sequence_stride, mask_head_stride, mask_stride = call.key_mask
    positions, position_stride = call.positions
    index = place.image * call.num_outer + place.line
    if const.HAS_FLAGS:
        positions += place.image * position_stride
    return Sequence(
        numbers + (index * sequence_stride + place.head * head_stride), number_stride, token_stride, positions,
        key_mask + (index * mask_sequence_stride + place.head * mask_head_stride), mask_stride, call.length, call.scale,
    )  # fmt: skip
