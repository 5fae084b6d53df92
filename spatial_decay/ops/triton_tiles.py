"""What all Triton kernels share: the decays with their slopes, loading, storing and multiplying tiles."""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
MANHATTAN = tl.constexpr(1)
PATH = tl.constexpr(2)
GAUSSIAN = tl.constexpr(3)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # instead of -inf, so that -inf - peak is no NaN


# The decays: a value and a slope each. Arguments broadcast to a tile of scores, whichever way it lies: q.. and k.. are
# the tokens' numbers and positions (h, w) of queries and keys. On a path w is the token's number along it.


@triton.jit
def add_decay(scores, q_token, k_token, q_h, q_w, k_h, k_w, KIND: tl.constexpr):
    """scores + M / scale; the first of the tokens' numbers is already divided by scale."""
    if KIND == MANHATTAN:  # (a_i + a_j) * d_M
        # fma by name: a plain addition would be folded into the matrix product and stall its loads.
        return tl.fma(q_token[0] + k_token, tl.abs(q_h - k_h) + tl.abs(q_w - k_w), scores)
    elif KIND == PATH:  # -|c_i - c_j|
        return scores - tl.abs(q_token[0] - k_token)
    elif KIND == GAUSSIAN:  # a_i * exp(-(u_i dh^2 + v_i dw^2))
        amplitude = tl.broadcast_to(q_token[0], scores.shape)
        return tl.fma(amplitude, _bell(q_token, q_h - k_h, q_w - k_w), scores)
    else:
        return scores


@triton.jit
def slopes(ds, q_token, k_token, q_h, q_w, k_h, k_w, KIND: tl.constexpr):
    """dS o dM/dt of the query's numbers (three) and of the key's, to be summed; what a kind lacks repeats another."""
    if KIND == MANHATTAN:
        slope = ds * (tl.abs(q_h - k_h) + tl.abs(q_w - k_w))
        return slope, slope, slope, slope
    elif KIND == PATH:
        # dS o dM/dc_j, whose sign is that of w_i - w_j, the tokens' numbers along the path, for c_j - c_i may be 0.
        # By way of the sign bit: comparing takes twice the instructions.
        sign = (q_w - k_w).to(tl.int32, bitcast=True) & -2147483648
        slope = (ds.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return -slope, -slope, -slope, slope
    elif KIND == GAUSSIAN:  # the factor -a_i of the second and third comes after the sum
        dh, dw = q_h - k_h, q_w - k_w
        slope = ds * _bell(q_token, dh, dw)
        return slope, slope * dh * dh, slope * dw * dw, slope
    else:
        return ds, ds, ds, ds


@triton.jit
def _bell(q_token, dh, dw):
    """exp(-(u dh^2 + v dw^2)), u and v in log2 units."""
    return tl.math.exp2(-(dh * dh * q_token[1] + dw * dw * q_token[2]))


# Loading and multiplying. head_dim is cut into D1, a power of two, and a rest D2, 0 if there is none: 72 costs 64 + 16.


@triton.jit
def load_tile(
    base, index, stride, stop, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr
):
    """WIDTH features from FIRST on of the tokens in index, (len(index), WIDTH); 0 past D and, if MASKED, past stop."""
    column = FIRST + tl.arange(0, WIDTH)
    address = base + index[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(address, mask=(index < stop)[:, None] & (column < D)[None, :], other=0.0)
    elif FIRST + WIDTH > D:
        return tl.load(address, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def load_features(base, index, stride, stop, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr):
    """Both parts of the features; the first one twice where there is no rest."""
    first = load_tile(base, index, stride, stop, 0, D1, D, MASKED)
    if D2 > 0:
        return first, load_tile(base, index, stride, stop, D1, D2, D, MASKED)
    else:
        return first, first


@triton.jit
def store_features(base, index, stride, stop, first, rest, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The inverse of load_features, in the dtype of the memory."""
    column = tl.arange(0, D1)
    address = base + index[:, None] * stride + column[None, :]
    tl.store(address, first.to(base.dtype.element_ty), mask=(index < stop)[:, None] & (column < D)[None, :])
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        address = base + index[:, None] * stride + column[None, :]
        tl.store(address, rest.to(base.dtype.element_ty), mask=(index < stop)[:, None] & (column < D)[None, :])


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """a @ b in float32. UPCAST is for the interpreter, which multiplies the bit patterns of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b, UPCAST: tl.constexpr):
    """total + a @ b."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def dot_features(a, a2, b, b2, D2: tl.constexpr, UPCAST: tl.constexpr):
    """The dot product of all pairs of a's and b's rows, over both parts."""
    out = dot(a, tl.trans(b), UPCAST)
    if D2 > 0:
        out = add_dot(out, a2, tl.trans(b2), UPCAST)
    return out


@triton.jit
def load_tokens(
    TOKENS, strides, POSITIONS, index, length, scale,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, HAS_FLAGS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of the tokens in index three numbers (what a kind lacks repeats the first), the position (h, w) and a flag.

    The first number is divided by scale. The flag is 1.0 where a token has a position; where it is 0.0 the numbers are
    too, whatever stands in memory.
    """
    mask = (index >= NUM_PREFIX) & (index < length)
    zero = tl.zeros(index.shape, tl.float32)
    first, second, third, h, w, flag = zero, zero, zero, zero, zero, zero
    if KIND != NONE:
        first = load_numbers(TOKENS + index * strides[1], mask, MASKED) * (1 / scale)
    if KIND == GAUSSIAN:
        second = load_numbers(TOKENS + strides[0] + index * strides[1], mask, MASKED) * LOG2E
        third = load_numbers(TOKENS + strides[0] + strides[0] + index * strides[1], mask, MASKED) * LOG2E
    if KIND == MANHATTAN or KIND == GAUSSIAN:
        h = load_numbers(POSITIONS + index, mask, MASKED)
    if KIND != NONE:
        w = load_numbers(POSITIONS + length + index, mask, MASKED)
    if HAS_FLAGS:
        flag = load_numbers(POSITIONS + 2 * length + index, mask, MASKED)
        first = tl.where(flag > 0, first, 0.0)
        second, third = tl.where(flag > 0, second, 0.0), tl.where(flag > 0, third, 0.0)
    else:
        flag = tl.where(index < NUM_PREFIX, 0.0, 1.0)
    return first, second, third, h, w, flag


@triton.jit
def load_numbers(address, mask, MASKED: tl.constexpr):
    """As float32; 0 where the mask is false."""
    if MASKED:
        return tl.load(address, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(address).to(tl.float32)


@triton.jit
def sequence_of(program, num_blocks, num_heads, num_outer):
    """What a program works on: its block, and image, line of the grid and head, in 64 bits."""
    block = program % num_blocks
    sequence = (program // num_blocks).to(tl.int64)
    head = sequence % num_heads
    line = sequence // num_heads % num_outer
    return block, sequence // num_heads // num_outer, line, head


@triton.jit
def beside(number, flag, ASKS: tl.constexpr):
    """A number that broadcasts along one side of a tile, 0 where the other side's token has no position.

    A sum of it and another number takes no instruction more: a product and a sum are one. ASKS: whether some have
    none.
    """
    if ASKS:
        return number * flag
    else:
        return number


@triton.jit
def scores_of(
    products, query, key, key_bias, j, stop,
    KIND: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Products (BLOCK_Q, BLOCK_K) of queries and keys -> scores / scale: with decay and key mask, -inf past stop."""
    scores = add_decay(
        products,
        (beside(query[0][:, None], key[5][None, :], HAS_FLAGS), query[1][:, None], query[2][:, None]),
        beside(key[0][None, :], query[5][:, None], HAS_PREFIX or HAS_FLAGS),
        query[3][:, None], query[4][:, None], key[3][None, :], key[4][None, :], KIND,
    )  # fmt: skip
    if HAS_KEY_BIAS:
        scores += key_bias[None, :]
    if MASKED:
        scores = tl.where((j < stop)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def load_key_bias(KEY_BIAS, stride, j, stop, scale, HAS_KEY_BIAS: tl.constexpr, MASKED: tl.constexpr):
    """What the key mask adds to every score of a key, divided by scale."""
    if HAS_KEY_BIAS:
        return load_numbers(KEY_BIAS + j * stride, j < stop, MASKED) / scale
    else:
        return 0.0


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """The strides of (B, O, N, L, d), which come in units of 16 bytes where they can.

    Triton sees by itself that a number is divisible by 16, but not by 8: with head_dim 72 it would load 2 bytes at a
    time instead of 16.
    """
    return strides[0] * UNIT, strides[1] * UNIT, strides[2] * UNIT, strides[3] * UNIT


@triton.jit
def offset(strides, image, line, head):
    """Where a sequence of (B, O, N, L, d) starts."""
    return image * strides[0] + line * strides[1] + head * strides[2]


@triton.jit
def token_offset(strides, sequence, head):
    """Where a sequence of (numbers, S, N, L) starts; the stride of what all sequences share is 0."""
    return sequence * strides[1] + head * strides[2]


@triton.jit
def row_offset(image, line, head, num_outer, num_heads, length):
    """Where a sequence of a contiguous (S, N, L) starts."""
    return ((image * num_outer + line) * num_heads + head) * length
