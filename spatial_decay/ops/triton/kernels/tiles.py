"""What all Triton kernels share: the pair formulas with their slopes, and loading, storing and multiplying tiles.

A pair formula is M_ij, and its slopes are dM_ij/dt for the numbers t of query i and of key j.
"""

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


class Numbers(NamedTuple):
    """Of tokens: up to three numbers, 0 where a formula has fewer, the position (h, w), and a flag, 0.0 if nowhere."""

    first: Any
    second: Any
    third: Any
    h: Any
    w: Any
    flag: Any


# The pair formulas. `query` and `key` are Numbers that broadcast to a tile of scores, whichever way it lies. On a path
# w is the token's place along it, and tokens at one place, which only Positions can have, add nothing to each other.


@triton.jit
def prepared(first, second, third, scale, FORMULA: tl.constexpr):
    """A token's numbers as value and slopes read them; the first is divided by scale, because the scores are."""
    if FORMULA == "gaussian":
        return first * (1 / scale), second * LOG2E, third * LOG2E
    else:
        return first * (1 / scale), second, third


@triton.jit
def add_decay(scores, query, key, FORMULA: tl.constexpr, const):
    """The value: scores + M / scale."""
    if FORMULA == "manhattan":  # (a_i + a_j) * d_M
        # fma by name: a plain addition would be folded into the matrix product and stall its loads.
        return tl.fma(query.first + key.first, tl.abs(query.h - key.h) + tl.abs(query.w - key.w), scores)
    elif FORMULA == "path":  # -|c_i - c_j|
        cost = tl.abs(query.first - key.first)
        if const.HAS_FLAGS:
            cost = tl.where(query.w == key.w, 0.0, cost)
        return scores - cost
    elif FORMULA == "gaussian":  # a_i * exp(-(u_i dh^2 + v_i dw^2))
        amplitude = tl.broadcast_to(query.first, scores.shape)
        return tl.fma(amplitude, _bell(query, query.h - key.h, query.w - key.w), scores)
    else:
        tl.static_assert(FORMULA == "none")
        return scores


@triton.jit
def slopes(ds, query, key, FORMULA: tl.constexpr, const):
    """dS o dM/dt of the query's three numbers and of the key's, to be summed; what a formula lacks repeats another."""
    if FORMULA == "manhattan":
        slope = product(ds, tl.abs(query.h - key.h) + tl.abs(query.w - key.w))
        return slope, slope, slope, slope
    elif FORMULA == "path":
        # dS o dM/dc_j, whose sign is that of w_i - w_j, the tokens' places along the path, for c_j - c_i may be 0.
        # By way of the sign bit: comparing takes twice the instructions.
        sign = (query.w - key.w).to(tl.int32, bitcast=True) & -2147483648
        slope = (ds.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        if const.HAS_FLAGS:
            slope = tl.where(query.w == key.w, 0.0, slope)
        return -slope, -slope, -slope, slope
    elif FORMULA == "gaussian":  # the factor -a_i of the second and third comes after the sum
        dh, dw = query.h - key.h, query.w - key.w
        slope = product(ds, _bell(query, dh, dw))
        return slope, product(slope * dh, dh), product(slope * dw, dw), slope
    else:
        tl.static_assert(FORMULA == "none")
        return ds, ds, ds, ds


@triton.jit
def product(a, b):
    """a * b, to be summed; rounded before that in small tiles.

    In these a thread may have one product of a row. In one instruction with the first addition its own would not be
    rounded, but those that other threads hand over: the last bits of the sum would differ from thread to thread.
    """
    if a.shape[0] * a.shape[1] <= 512:
        return tl.fma(a, b, tl.zeros_like(a))
    else:
        return a * b


@triton.jit
def completed(sum1, sum2, sum3, query, scale, FORMULA: tl.constexpr):
    """The gradients of the query's numbers from the sums of its slopes: what is the same for all keys."""
    if FORMULA == "gaussian":
        amplitude = query.first * scale  # 0 for prefix tokens
        return sum1, -amplitude * sum2, -amplitude * sum3
    else:
        return sum1, sum2, sum3


@triton.jit
def _bell(query, dh, dw):
    """exp(-(u dh^2 + v dw^2)), u and v in log2 units."""
    return tl.math.exp2(-(dh * dh * query.second + dw * dw * query.third))


# The numbers of tokens.


@triton.jit
def load_numbers(sequence, index, MASKED: tl.constexpr, const):
    """Numbers of the tokens in index; 0 of those whose flag is 0, whatever lies there.

    MASKED: Whether index may hold prefix tokens, whose flag is 0, and places past the end of the sequence.
    """
    mask = (index >= const.NUM_PREFIX) & (index < sequence.length)
    zero = tl.zeros(index.shape, tl.float32)
    first, second, third, h, w = zero, zero, zero, zero, zero
    if const.FORMULA != "none":
        start, step = sequence.numbers, sequence.number_stride
        first = load_row(start + index * sequence.token_stride, mask, MASKED)
        if const.NUM_NUMBERS > 1:
            second = load_row(start + step + index * sequence.token_stride, mask, MASKED)
            third = load_row(start + step + step + index * sequence.token_stride, mask, MASKED)
        first, second, third = prepared(first, second, third, sequence.scale, const.FORMULA)
        h = load_row(sequence.positions + index, mask, MASKED)
        w = load_row(sequence.positions + sequence.length + index, mask, MASKED)
    if const.HAS_FLAGS:
        flag = load_row(sequence.positions + 2 * sequence.length + index, mask, MASKED)
        first = tl.where(flag > 0, first, 0.0)
        second, third = tl.where(flag > 0, second, 0.0), tl.where(flag > 0, third, 0.0)
    elif MASKED:
        flag = tl.where(index < const.NUM_PREFIX, 0.0, 1.0)
    else:
        flag = zero + 1.0
    return Numbers(first, second, third, h, w, flag)


@triton.jit
def numbers_now(sequence, index, is_true, MASKED: tl.constexpr, const):
    """The same, loaded where it stands, in a branch.

    In a loop Triton would load rows ahead, into shared memory; until its version 3.6 every thread copied all that it
    reads. The backward kernels, which read up to five rows, take 3 to 21 percent less time so on an H200.

    is_true: Always; a condition that the compiler does not see through.
    """
    zero = tl.zeros(index.shape, tl.float32)
    numbers = Numbers(zero, zero, zero, zero, zero, zero)
    if is_true:
        numbers = load_numbers(sequence, index, MASKED, const)
    return numbers


@triton.jit
def down(numbers):
    """Numbers that go down a tile, (len, 1)."""
    return Numbers(
        numbers.first[:, None], numbers.second[:, None], numbers.third[:, None],
        numbers.h[:, None], numbers.w[:, None], numbers.flag[:, None],
    )  # fmt: skip


@triton.jit
def across(numbers):
    """Numbers that go across a tile, (1, len)."""
    return Numbers(
        numbers.first[None, :], numbers.second[None, :], numbers.third[None, :],
        numbers.h[None, :], numbers.w[None, :], numbers.flag[None, :],
    )  # fmt: skip


@triton.jit
def beside(numbers, flag, ASKS: tl.constexpr):
    """Numbers of one side of a tile, the first 0 where the other side's token has no position (flag).

    A sum of it and another number takes no instruction more: a product and a sum are one. ASKS: whether some have
    none.
    """
    if ASKS:
        return Numbers(numbers.first * flag, numbers.second, numbers.third, numbers.h, numbers.w, numbers.flag)
    else:
        return numbers


@triton.jit
def only_placed(ds, walked, IS_REST: tl.constexpr, const):
    """ds, 0 where the token of the side that is walked over has no position."""
    if const.HAS_FLAGS or (IS_REST and const.NUM_PREFIX > 0):
        return ds * walked.flag
    else:
        return ds


@triton.jit
def scores_of(products, query, key, key_mask, j, stop, FORMULA: tl.constexpr, MASKED: tl.constexpr, const):
    """Products (BLOCK_Q, BLOCK_K) of queries and keys -> scores / scale: with decay and key mask, -inf past stop."""
    scores = add_decay(products, query, key, FORMULA, const)
    if const.HAS_KEY_MASK:
        scores += key_mask[None, :]
    if MASKED:
        scores = tl.where((j < stop)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def load_key_mask(sequence, j, MASKED: tl.constexpr, const):
    """What is added to every score of a key, divided by scale."""
    if const.HAS_KEY_MASK:
        return load_row(sequence.key_mask + j * sequence.key_mask_stride, j < sequence.length, MASKED) / sequence.scale
    else:
        return 0.0


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
