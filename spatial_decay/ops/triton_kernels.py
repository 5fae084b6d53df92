"""Triton kernels of attention with a decay, and of its gradients, for sequences of any length (SDT Eq. 10).

    O = softmax(S) V,    S = scale * Q K^T + M

Forward: one program owns BLOCK_Q queries of one head and walks over all keys, BLOCK_K at a time. It keeps the largest
score so far (peak), the sum of the weights (total) and the weighted sum of the values (out), and scales the last two
down whenever peak grows. No L x L matrix is ever stored; for the backward pass one number a query is kept,

    lse_i = log2 sum_j exp(S_ij),    so that    P_ij = exp2(S_ij * log2(e) - lse_i).

Backward: with dO the output's gradient and o the product by elements,

    dP = dO V^T        delta_i = sum_d dO_id O_id        dS = P o (dP - delta)
    dV = P^T dO        dQ = scale * dS K                 dK = scale * dS^T Q

and for a number t of the tokens, dt_i = sum_j dS_ij dM_ij/dt_i + sum_j dS_ji dM_ji/dt_i. The first sum belongs to the
programs that own queries (backward_rows, with delta and dQ), the second to those that own keys (backward_columns, with
dK and dV), which add theirs to what the first wrote. So nothing is added atomically, and results repeat bit for bit.

Inside, scores are Q K^T + M / scale: scale comes in once, within exp2. All sums are float32, because half precision has
too few bits for sums of hundreds of terms. Lanes past the end of a sequence are loaded as 0 and never stored; as keys
they get the score -inf, as queries lse = +inf: in both cases P = 0.

Prefix tokens have no position: M = 0 wherever they take part. On the side that is walked over they are a small block of
their own without decay; on the other, all tokens' numbers are 0 to them (beside). Where such tokens may be anywhere
(Positions), each has a flag, and all numbers are 0 to them on both sides.

Tensors are (B, O, N, L, d): O counts the rows or columns of a grid where these are the sequences, and is 1 otherwise.
"""

import triton
import triton.language as tl

from spatial_decay.ops.triton_tiles import (
    GAUSSIAN,
    LOG2E,
    LOWEST,
    MANHATTAN,
    NONE,
    PATH,
    add_decay,
    add_dot,
    beside,
    dot_features,
    in_elements,
    load_features,
    load_key_bias,
    load_tokens,
    offset,
    row_offset,
    scores_of,
    sequence_of,
    slopes,
    store_features,
    token_offset,
)

__all__ = ["backward_columns", "backward_rows", "forward"]


@triton.jit
def _walk_keys(
    state, block, memory, start, stop,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The forward loop over the keys start .. stop - 1; state: out in two parts, total and peak."""
    q, query = block
    K, V, TOKENS, KEY_BIAS, POSITIONS, strides, length, scale = memory
    out, out2, total, peak = state
    to_log2 = scale * LOG2E
    for first in range(start, stop, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        k, k2 = load_features(K, j, strides[0], stop, D, D1, D2, MASKED)
        key = load_tokens(TOKENS, strides[2], POSITIONS, j, length, scale, KIND, 0, HAS_FLAGS, MASKED)
        key_bias = load_key_bias(KEY_BIAS, strides[3], j, stop, scale, HAS_KEY_BIAS, MASKED)
        products = dot_features(q[0], q[1], k, k2, D2, UPCAST)
        scores = scores_of(
            products, query, key, key_bias, j, stop,
            KIND, NUM_PREFIX > 0, HAS_FLAGS, HAS_KEY_BIAS, MASKED,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.math.exp2(scores * to_log2 - (new_peak * to_log2)[:, None])
        shrink = tl.math.exp2((peak - new_peak) * to_log2)
        total = total * shrink + tl.sum(p, 1)
        v, v2 = load_features(V, j, strides[1], stop, D, D1, D2, MASKED)
        p = p.to(v.dtype)
        out = add_dot(out * shrink[:, None], p, v, UPCAST)
        if D2 > 0:
            out2 = add_dot(out2 * shrink[:, None], p, v2, UPCAST)
        peak = new_peak
    return out, out2, total, peak


@triton.jit
def forward(
    Q, K, V, O, LSE, TOKENS, KEY_BIAS, POSITIONS, q_strides, k_strides, v_strides, o_strides, token_strides,
    key_bias_strides, position_stride, num_outer, num_heads, length, scale,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, PREFIX_BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL_BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """O and lse of BLOCK_Q queries of one head."""
    q_strides = in_elements(q_strides, UNIT)
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    o_strides = in_elements(o_strides, UNIT)
    num_blocks = tl.cdiv(length, BLOCK_Q)
    index, image, line, head = sequence_of(tl.program_id(0), num_blocks, num_heads, num_outer)
    if HAS_FLAGS:
        POSITIONS += image * position_stride
    i = index * BLOCK_Q + tl.arange(0, BLOCK_Q)
    K += offset(k_strides, image, line, head)
    V += offset(v_strides, image, line, head)
    TOKENS += token_offset(token_strides, image * num_outer + line, head)
    KEY_BIAS += token_offset(key_bias_strides, image * num_outer + line, head)
    strides = (k_strides[3], v_strides[3], (token_strides[0], token_strides[3]), key_bias_strides[3])

    q = load_features(Q + offset(q_strides, image, line, head), i, q_strides[3], length, D, D1, D2, True)
    query = load_tokens(TOKENS, strides[2], POSITIONS, i, length, scale, KIND, NUM_PREFIX, HAS_FLAGS, True)
    zeros = tl.zeros([BLOCK_Q, D1], tl.float32)
    state = (
        zeros, tl.zeros([BLOCK_Q, D2], tl.float32) if D2 > 0 else zeros,
        tl.zeros([BLOCK_Q], tl.float32), tl.full([BLOCK_Q], LOWEST, tl.float32),
    )  # fmt: skip
    block = (q, query)
    memory = (K, V, TOKENS, KEY_BIAS, POSITIONS, strides, length, scale)
    if NUM_PREFIX > 0:
        state = _walk_keys(
            state, block, memory, 0, NUM_PREFIX, NONE, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, PREFIX_BLOCK, True, UPCAST,
        )  # fmt: skip
    whole = length - (length - NUM_PREFIX) % BLOCK_K
    state = _walk_keys(
        state, block, memory, NUM_PREFIX, whole, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
        D2, BLOCK_K, False, UPCAST,
    )  # fmt: skip
    if TAIL_BLOCK > 0:
        state = _walk_keys(
            state, block, memory, whole, length, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, TAIL_BLOCK, True, UPCAST,
        )  # fmt: skip
    out, out2, total, peak = state
    # A query that may attend to nothing: O = 0, and lse = +inf makes P = 0 in the backward pass.
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    inverse = tl.where(is_empty, 0.0, 1.0 / total)
    lse = tl.where(is_empty, float("inf"), peak * (scale * LOG2E) + tl.math.log2(total))
    O += offset(o_strides, image, line, head)
    store_features(O, i, o_strides[3], length, out * inverse[:, None], out2 * inverse[:, None], D, D1, D2)
    tl.store(LSE + row_offset(image, line, head, num_outer, num_heads, length) + i, lse, mask=i < length)


@triton.jit
def _walk_keys_back(
    state, block, memory, start, stop,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The loop of backward_rows over the keys; state: dQ / scale in two parts and the sums of the query's slopes."""
    q, do, query, lse, delta = block
    K, V, TOKENS, KEY_BIAS, POSITIONS, strides, length, scale = memory
    dq, dq2, slope0, slope1, slope2 = state
    for first in range(start, stop, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        k, k2 = load_features(K, j, strides[0], stop, D, D1, D2, MASKED)
        v, v2 = load_features(V, j, strides[1], stop, D, D1, D2, MASKED)
        key = load_tokens(TOKENS, strides[2], POSITIONS, j, length, scale, KIND, 0, HAS_FLAGS, MASKED)
        key_bias = load_key_bias(KEY_BIAS, strides[3], j, stop, scale, HAS_KEY_BIAS, MASKED)
        products = dot_features(q[0], q[1], k, k2, D2, UPCAST)
        scores = scores_of(
            products, query, key, key_bias, j, stop,
            KIND, NUM_PREFIX > 0, HAS_FLAGS, HAS_KEY_BIAS, MASKED,
        )  # fmt: skip
        p = tl.math.exp2(scores * (scale * LOG2E) - lse[:, None])
        dp = dot_features(do[0], do[1], v, v2, D2, UPCAST)
        ds = p * (dp - delta[:, None])
        if KIND != NONE:
            row0, row1, row2, _ = slopes(
                beside(ds, key[5][None, :], HAS_FLAGS),
                (beside(query[0][:, None], key[5][None, :], HAS_FLAGS), query[1][:, None], query[2][:, None]),
                beside(key[0][None, :], query[5][:, None], NUM_PREFIX > 0 or HAS_FLAGS),
                query[3][:, None], query[4][:, None], key[3][None, :], key[4][None, :], KIND,
            )  # fmt: skip
            slope0 += tl.sum(row0, 1)
            if KIND == GAUSSIAN:
                slope1 += tl.sum(row1, 1)
                slope2 += tl.sum(row2, 1)
        ds = ds.to(k.dtype)
        dq = add_dot(dq, ds, k, UPCAST)
        if D2 > 0:
            dq2 = add_dot(dq2, ds, k2, UPCAST)
    return dq, dq2, slope0, slope1, slope2


@triton.jit
def backward_rows(
    Q, K, V, O, DO, DQ, LSE, DELTA, DTOKENS, TOKENS, KEY_BIAS, POSITIONS, q_strides, k_strides, v_strides, o_strides,
    do_strides, dq_strides, token_strides, key_bias_strides, position_stride, num_outer, num_heads, length, scale,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, PREFIX_BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL_BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """delta, dQ and the row sums of the tokens' gradient, of BLOCK_Q queries of one head."""
    q_strides = in_elements(q_strides, UNIT)
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    o_strides = in_elements(o_strides, UNIT)
    do_strides = in_elements(do_strides, UNIT)
    dq_strides = in_elements(dq_strides, UNIT)
    num_blocks = tl.cdiv(length, BLOCK_Q)
    index, image, line, head = sequence_of(tl.program_id(0), num_blocks, num_heads, num_outer)
    if HAS_FLAGS:
        POSITIONS += image * position_stride
    i = index * BLOCK_Q + tl.arange(0, BLOCK_Q)
    K += offset(k_strides, image, line, head)
    V += offset(v_strides, image, line, head)
    TOKENS += token_offset(token_strides, image * num_outer + line, head)
    KEY_BIAS += token_offset(key_bias_strides, image * num_outer + line, head)
    strides = (k_strides[3], v_strides[3], (token_strides[0], token_strides[3]), key_bias_strides[3])

    q = load_features(Q + offset(q_strides, image, line, head), i, q_strides[3], length, D, D1, D2, True)
    o = load_features(O + offset(o_strides, image, line, head), i, o_strides[3], length, D, D1, D2, True)
    do = load_features(DO + offset(do_strides, image, line, head), i, do_strides[3], length, D, D1, D2, True)
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    row = row_offset(image, line, head, num_outer, num_heads, length)
    tl.store(DELTA + row + i, delta, mask=i < length)
    lse = tl.load(LSE + row + i, mask=i < length, other=float("inf"))
    query = load_tokens(TOKENS, strides[2], POSITIONS, i, length, scale, KIND, NUM_PREFIX, HAS_FLAGS, True)
    zeros, none = tl.zeros([BLOCK_Q, D1], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    state = (zeros, tl.zeros([BLOCK_Q, D2], tl.float32) if D2 > 0 else zeros, none, none, none)
    block = (q, do, query, lse, delta)
    memory = (K, V, TOKENS, KEY_BIAS, POSITIONS, strides, length, scale)
    if NUM_PREFIX > 0:
        state = _walk_keys_back(
            state, block, memory, 0, NUM_PREFIX, NONE, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, PREFIX_BLOCK, True, UPCAST,
        )  # fmt: skip
    whole = length - (length - NUM_PREFIX) % BLOCK_K
    state = _walk_keys_back(
        state, block, memory, NUM_PREFIX, whole, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
        D2, BLOCK_K, False, UPCAST,
    )  # fmt: skip
    if TAIL_BLOCK > 0:
        state = _walk_keys_back(
            state, block, memory, whole, length, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, TAIL_BLOCK, True, UPCAST,
        )  # fmt: skip
    dq, dq2, slope0, slope1, slope2 = state
    DQ += offset(dq_strides, image, line, head)
    store_features(DQ, i, dq_strides[3], length, dq * scale, dq2 * scale, D, D1, D2)
    if KIND != NONE:
        tl.store(DTOKENS + row + i, slope0 * query[5], mask=i < length)
    if KIND == GAUSSIAN:
        amplitude = query[0] * scale  # 0 for prefix tokens
        size = tl.num_programs(0).to(tl.int64) // num_blocks * length  # of each number's gradient, S * N * L
        tl.store(DTOKENS + size + row + i, -amplitude * slope1, mask=i < length)
        tl.store(DTOKENS + 2 * size + row + i, -amplitude * slope2, mask=i < length)


@triton.jit
def _walk_queries(
    state, block, memory, start, stop,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, HAS_FLAGS: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The loop of backward_columns over the queries, tiles lying (BLOCK_K, BLOCK_Q).

    state: dK / scale and dV in two parts each, and the sums of the key's slopes.
    """
    k, v, key, key_bias = block
    Q, DO, LSE, DELTA, TOKENS, POSITIONS, strides, length, scale = memory
    dk, dk2, dv, dv2, slope = state
    for first in range(start, stop, BLOCK_Q):
        i = first + tl.arange(0, BLOCK_Q)
        q, q2 = load_features(Q, i, strides[0], stop, D, D1, D2, MASKED)
        do, do2 = load_features(DO, i, strides[1], stop, D, D1, D2, MASKED)
        query = load_tokens(TOKENS, strides[2], POSITIONS, i, length, scale, KIND, 0, HAS_FLAGS, MASKED)
        if MASKED:
            lse = tl.load(LSE + i, mask=i < stop, other=float("inf"))
            delta = tl.load(DELTA + i, mask=i < stop, other=0.0)
        else:
            lse = tl.load(LSE + i)
            delta = tl.load(DELTA + i)
        q_token = (
            beside(query[0][None, :], key[5][:, None], NUM_PREFIX > 0 or HAS_FLAGS),
            query[1][None, :], query[2][None, :],
        )  # fmt: skip
        k_token = beside(key[0][:, None], query[5][None, :], HAS_FLAGS)
        q_h, q_w, k_h, k_w = query[3][None, :], query[4][None, :], key[3][:, None], key[4][:, None]
        scores = add_decay(dot_features(k[0], k[1], q, q2, D2, UPCAST), q_token, k_token, q_h, q_w, k_h, k_w, KIND)
        if HAS_KEY_BIAS:
            scores += key_bias[:, None]
        p = tl.math.exp2(scores * (scale * LOG2E) - lse[None, :])
        ds = p * (dot_features(v[0], v[1], do, do2, D2, UPCAST) - delta[None, :])
        if KIND == MANHATTAN or KIND == PATH:
            column_ds = beside(ds, query[5][None, :], HAS_FLAGS)
            _, _, _, column = slopes(column_ds, q_token, k_token, q_h, q_w, k_h, k_w, KIND)
            slope += tl.sum(column, 1)
        p, ds = p.to(do.dtype), ds.to(q.dtype)
        dv = add_dot(dv, p, do, UPCAST)
        dk = add_dot(dk, ds, q, UPCAST)
        if D2 > 0:
            dv2 = add_dot(dv2, p, do2, UPCAST)
            dk2 = add_dot(dk2, ds, q2, UPCAST)
    return dk, dk2, dv, dv2, slope


@triton.jit
def backward_columns(
    Q, K, V, DO, DK, DV, LSE, DELTA, DTOKENS, TOKENS, KEY_BIAS, POSITIONS, q_strides, k_strides, v_strides, do_strides,
    dk_strides, dv_strides, token_strides, key_bias_strides, position_stride, num_outer, num_heads, length, scale,
    KIND: tl.constexpr, NUM_PREFIX: tl.constexpr, PREFIX_BLOCK: tl.constexpr, HAS_FLAGS: tl.constexpr,
    HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, TAIL_BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK, dV and the column sums of the tokens' gradient, of BLOCK_K keys of one head; after backward_rows."""
    q_strides = in_elements(q_strides, UNIT)
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    do_strides = in_elements(do_strides, UNIT)
    dk_strides = in_elements(dk_strides, UNIT)
    dv_strides = in_elements(dv_strides, UNIT)
    num_blocks = tl.cdiv(length, BLOCK_K)
    index, image, line, head = sequence_of(tl.program_id(0), num_blocks, num_heads, num_outer)
    if HAS_FLAGS:
        POSITIONS += image * position_stride
    j = index * BLOCK_K + tl.arange(0, BLOCK_K)
    row = row_offset(image, line, head, num_outer, num_heads, length)
    Q += offset(q_strides, image, line, head)
    DO += offset(do_strides, image, line, head)
    TOKENS += token_offset(token_strides, image * num_outer + line, head)
    KEY_BIAS += token_offset(key_bias_strides, image * num_outer + line, head)
    LSE += row
    DELTA += row
    strides = (q_strides[3], do_strides[3], (token_strides[0], token_strides[3]))

    k = load_features(K + offset(k_strides, image, line, head), j, k_strides[3], length, D, D1, D2, True)
    v = load_features(V + offset(v_strides, image, line, head), j, v_strides[3], length, D, D1, D2, True)
    key = load_tokens(TOKENS, strides[2], POSITIONS, j, length, scale, KIND, NUM_PREFIX, HAS_FLAGS, True)
    key_bias = load_key_bias(KEY_BIAS, key_bias_strides[3], j, length, scale, HAS_KEY_BIAS, True)
    zeros = tl.zeros([BLOCK_K, D1], tl.float32)
    zeros2 = tl.zeros([BLOCK_K, D2], tl.float32) if D2 > 0 else zeros
    state = (zeros, zeros2, zeros, zeros2, tl.zeros([BLOCK_K], tl.float32))
    block = (k, v, key, key_bias)
    memory = (Q, DO, LSE, DELTA, TOKENS, POSITIONS, strides, length, scale)
    if NUM_PREFIX > 0:
        state = _walk_queries(
            state, block, memory, 0, NUM_PREFIX, NONE, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, PREFIX_BLOCK, True, UPCAST,
        )  # fmt: skip
    whole = length - (length - NUM_PREFIX) % BLOCK_Q
    state = _walk_queries(
        state, block, memory, NUM_PREFIX, whole, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
        D2, BLOCK_Q, False, UPCAST,
    )  # fmt: skip
    if TAIL_BLOCK > 0:
        state = _walk_queries(
            state, block, memory, whole, length, KIND, NUM_PREFIX, HAS_FLAGS, HAS_KEY_BIAS, D, D1,
            D2, TAIL_BLOCK, True, UPCAST,
        )  # fmt: skip
    dk, dk2, dv, dv2, slope = state
    DK += offset(dk_strides, image, line, head)
    DV += offset(dv_strides, image, line, head)
    store_features(DK, j, dk_strides[3], length, dk * scale, dk2 * scale, D, D1, D2)
    store_features(DV, j, dv_strides[3], length, dv, dv2, D, D1, D2)
    if KIND == MANHATTAN or KIND == PATH:
        rows = tl.load(DTOKENS + row + j, mask=j < length, other=0.0)
        tl.store(DTOKENS + row + j, rows + slope * key[5], mask=j < length)
