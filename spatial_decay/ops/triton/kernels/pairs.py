"""The pair formulas of the Triton kernels with their slopes, and the numbers of tokens that they read.

A pair formula is M_ij (SDT Eq. 6, 8 and LocAtViT's Gaussian), and its slopes are dM_ij/dt for the numbers t of query i
and of key j.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from spatial_decay.ops.triton.kernels.tiles import LOG2E, load_row


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
def prepared(first, second, third, scale, const):
    """A token's numbers as value and slopes read them; the first is divided by scale, because the scores are."""
    if const.FORMULA == "gaussian":
        return first * (1 / scale), second * LOG2E, third * LOG2E
    else:
        return first * (1 / scale), second, third


@triton.jit
def add_decay(scores, query, key, const):
    """The value: scores + M / scale."""
    # fma by name: a plain addition would be folded into the matrix product and stall its loads.
    if const.FORMULA == "manhattan":  # (a_i + a_j) * d_M, in place: by way of a function it takes more registers
        return tl.fma(query.first + key.first, tl.abs(query.h - key.h) + tl.abs(query.w - key.w), scores)
    elif const.FORMULA == "path":  # -|c_i - c_j|
        cost = tl.abs(query.first - key.first)
        if const.HAS_FLAGS:
            cost = tl.where(query.w == key.w, 0.0, cost)
        return scores - cost
    elif const.FORMULA == "gaussian":  # a_i * exp(-(u_i dh^2 + v_i dw^2))
        amplitude = tl.broadcast_to(query.first, scores.shape)
        return tl.fma(amplitude, _bell(query, query.h - key.h, query.w - key.w), scores)
    elif const.FORMULA == "none":
        return scores
    else:  # (a_i + a_j) * distance
        return tl.fma(query.first + key.first, _distance(query, key, const), scores)


@triton.jit
def slopes(ds, query, key, const):
    """dS o dM/dt of the query's three numbers and of the key's, to be summed; what a formula lacks repeats another."""
    if const.FORMULA == "manhattan":
        slope = product(ds, tl.abs(query.h - key.h) + tl.abs(query.w - key.w))
        return slope, slope, slope, slope
    elif const.FORMULA == "path":
        # dS o dM/dc_j, whose sign is that of w_i - w_j, the tokens' places along the path, for c_j - c_i may be 0.
        # By way of the sign bit: comparing takes twice the instructions.
        sign = (query.w - key.w).to(tl.int32, bitcast=True) & -2147483648
        slope = (ds.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        if const.HAS_FLAGS:
            slope = tl.where(query.w == key.w, 0.0, slope)
        return -slope, -slope, -slope, slope
    elif const.FORMULA == "gaussian":  # the factor -a_i of the second and third comes after the sum
        dh, dw = query.h - key.h, query.w - key.w
        slope = product(ds, _bell(query, dh, dw))
        return slope, product(slope * dh, dh), product(slope * dw, dw), slope
    elif const.FORMULA == "none":
        return ds, ds, ds, ds
    else:
        slope = product(ds, _distance(query, key, const))
        return slope, slope, slope, slope


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
def completed(sum1, sum2, sum3, query, scale, const):
    """The gradients of the query's numbers from the sums of its slopes: what is the same for all keys."""
    if const.FORMULA == "gaussian":
        amplitude = query.first * scale  # 0 for prefix tokens
        return sum1, -amplitude * sum2, -amplitude * sum3
    else:
        return sum1, sum2, sum3


@triton.jit
def _distance(query, key, const):
    """The Euclidean one, whose root is the GPU's own, to some 1e-7 of it, or its square."""
    dh, dw = query.h - key.h, query.w - key.w
    if const.FORMULA == "euclidean":
        return tl.sqrt(dh * dh + dw * dw)
    else:
        tl.static_assert(const.FORMULA == "squared")
        return tl.fma(dh, dh, dw * dw)


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
        first, second, third = prepared(first, second, third, sequence.scale, const)
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
def scores_of(products, query, key, key_mask, sequence, j, MASKED: tl.constexpr, const):
    """Products (BLOCK_Q, BLOCK_K) of queries and keys -> scores / scale: with decay and key mask, -inf past the end."""
    scores = add_decay(products, query, key, const)
    if const.HAS_KEY_MASK:
        scores += key_mask[None, :]
    if MASKED:
        scores = tl.where((j < sequence.length)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def load_key_mask(sequence, j, MASKED: tl.constexpr, const):
    """What is added to every score of a key, divided by scale."""
    if const.HAS_KEY_MASK:
        return load_row(sequence.key_mask + j * sequence.key_mask_stride, j < sequence.length, MASKED) / sequence.scale
    else:
        return 0.0
