"""Triton kernels of attention with a decay, and of its gradients, for sequences of any length (SDT Eq. 10).

    O = softmax(S) V,    S = scale * Q K^T + M

Forward: one program owns BLOCK_Q queries of one head and walks over all keys, BLOCK_K at a time. It keeps the largest
score so far (peak, times log2(e)), the sum of the weights (total) and the weighted sum of the values (out), and scales
the last two down whenever peak grows. No L x L matrix is ever stored; for the backward pass one number a query is kept,

    lse_i = peak_i + log2(total_i),    so that    P_ij = exp2(S_ij * log2(e) - lse_i).

In float32 peak and 1 / total are kept apart, since lse rounds by its own size times 6e-8, which all weights of the row
would have in common; half precision rounds by more than that.

Backward: with dO the output's gradient and o the product by elements,

    dP = dO V^T        delta_i = sum_d dO_id O_id        dS = P o (dP - delta)
    dV = P^T dO        dQ = scale * dS K                 dK = scale * dS^T Q

and for a number t of each token, dt_i = sum_j dS_ij dM_ij/dt_i + sum_j dS_ji dM_ji/dt_i. The first sum belongs to the
programs that own queries (backward_rows, with delta and dQ), the second to those that own keys (backward_columns, with
dK and dV), which add theirs to what the first wrote. So nothing is added atomically, and results repeat bit for bit.

Inside, scores are Q K^T + M / scale: scale comes in once, within exp2. It is a power of two in float32, so that the
numbers of M lose nothing to it, and the factor that is left goes to the side that a program owns. All sums are float32,
because half precision has too few bits for sums of hundreds of terms. Lanes past the end of a sequence are loaded as 0
and never stored; as keys they get the score -inf, as queries lse = +inf: in both cases P = 0.

Prefix tokens have no position: M = 0 wherever they take part, because to them the first number of each other token is
0 (beside). Of the side that is walked over they come last, in one block with the last tokens, so that no other block
asks for them. Where tokens without a position may be anywhere (Positions), each block does.

Tensors are (B, O, N, L, d): O counts the rows or columns of a grid where these are the sequences, and is 1 otherwise.
"""

import triton
import triton.language as tl

from spatial_decay.ops.triton.kernels.pairs import (
    across,
    add_decay,
    beside,
    completed,
    down,
    load_key_mask,
    load_numbers,
    numbers_now,
    only_placed,
    scores_of,
    slopes,
)
from spatial_decay.ops.triton.kernels.tiles import (
    LOG2E,
    LOWEST_PEAK,
    add_dot,
    dot_features,
    features_at,
    load_features,
    load_row,
    place_of,
    scaled,
    sequence_at,
    store_features,
)

__all__ = ["backward_columns", "backward_rows", "forward"]


@triton.jit
def _walk(LOOP: tl.constexpr, state, owned, walked, length, BLOCK: tl.constexpr, const):
    """LOOP over all tokens: whole blocks of those with a position, then the rest (see _tokens)."""
    whole = length - (length - const.NUM_PREFIX) % BLOCK
    state = LOOP(state, owned, walked, const.NUM_PREFIX, whole, whole, BLOCK, False, const)
    if const.REST_BLOCK > 0:
        num_rest = const.NUM_PREFIX + length - whole
        state = LOOP(state, owned, walked, 0, num_rest, whole, const.REST_BLOCK, True, const)
    return state


@triton.jit
def _tokens(first, whole, BLOCK: tl.constexpr, IS_REST: tl.constexpr, const):
    """BLOCK tokens from first on. The rest are those of the prefix and those from whole on, counted together."""
    index = first + tl.arange(0, BLOCK)
    if IS_REST:
        return tl.where(index < const.NUM_PREFIX, index, index + (whole - const.NUM_PREFIX))
    else:
        return index


@triton.jit
def _face(owned, walked, IS_REST: tl.constexpr, const):
    """Numbers of the side that a program owns and of that which it walks over, as they stand to each other."""
    has_prefix: tl.constexpr = const.NUM_PREFIX > 0
    faced = beside(owned, walked.flag, const.HAS_FLAGS or (IS_REST and has_prefix))
    return faced, beside(walked, owned.flag, const.HAS_FLAGS or has_prefix)


@triton.jit
def _over_keys(state, owned, walked, start, stop, whole, BLOCK: tl.constexpr, IS_REST: tl.constexpr, const):
    """The loop of forward over the keys start .. stop - 1; state: out in two parts, total and peak."""
    out, out2, total, peak = state
    q, queries = owned
    k_at, v_at, sequence = walked
    to_log2 = sequence.scale * LOG2E
    for first in range(start, stop, BLOCK):
        j = _tokens(first, whole, BLOCK, IS_REST, const)
        k = load_features(k_at, j, sequence.length, IS_REST, const)
        keys = load_numbers(sequence, j, IS_REST, const)
        key_mask = load_key_mask(sequence, j, IS_REST, const)
        query, key = _face(down(queries), across(keys), IS_REST, const)
        scores = scores_of(dot_features(q, k, const), query, key, key_mask, sequence, j, IS_REST, const)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * to_log2)
        p = tl.math.exp2(scores * to_log2 - new_peak[:, None])
        shrink = tl.math.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        v, v2 = load_features(v_at, j, sequence.length, IS_REST, const)
        p = p.to(v.dtype)
        out = add_dot(out * shrink[:, None], p, v, const)
        if const.D2 > 0:
            out2 = add_dot(out2 * shrink[:, None], p, v2, const)
        peak = new_peak
    return out, out2, total, peak


@triton.jit
def forward(call, const):
    """O and lse of BLOCK_Q queries of one head."""
    q_tensor, k_tensor, v_tensor, o_tensor = call.features
    place = place_of(call, tl.cdiv(call.length, const.BLOCK_Q))
    i = place.block * const.BLOCK_Q + tl.arange(0, const.BLOCK_Q)
    k_at, v_at = features_at(k_tensor, place, const), features_at(v_tensor, place, const)
    sequence = sequence_at(call, place, const)
    walked = (k_at, v_at, sequence)
    q = scaled(load_features(features_at(q_tensor, place, const), i, call.length, True, const), call.factor)
    owned = (q, load_numbers(sequence, i, True, const))
    zeros = tl.zeros([const.BLOCK_Q, const.D1], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_Q, const.D2], tl.float32) if const.D2 > 0 else zeros
    state = (zeros, zeros2, tl.zeros([const.BLOCK_Q], tl.float32), tl.full([const.BLOCK_Q], LOWEST_PEAK, tl.float32))
    out, out2, total, peak = _walk(_over_keys, state, owned, walked, call.length, const.BLOCK_K, const)
    # A query that may attend to nothing: O = 0, and lse = +inf makes P = 0 in the backward pass.
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    inverse = tl.where(is_empty, 0.0, 1.0 / total)
    mask, LSE = i < call.length, call.rows[0] + place.row
    is_split: tl.constexpr = q[0].dtype == tl.float32
    lse = peak if is_split else peak + tl.math.log2(total)
    tl.store(LSE + i, tl.where(is_empty, float("inf"), lse), mask=mask)
    if is_split:
        tl.store(LSE + _num_rows(call, const.BLOCK_Q) + i, inverse, mask=mask)
    out, out2 = out * inverse[:, None], out2 * inverse[:, None]
    store_features(features_at(o_tensor, place, const), i, call.length, out, out2, const)


@triton.jit
def _num_rows(call, BLOCK: tl.constexpr):
    """S * N * L, in 64 bits; of a launch with BLOCK tokens a program."""
    return tl.num_programs(0).to(tl.int64) // tl.cdiv(call.length, BLOCK) * call.length


@triton.jit
def _load_sums(LSE, num_rows, i, stop, MASKED: tl.constexpr, IS_SPLIT: tl.constexpr):
    """lse of queries, twice; or, where IS_SPLIT, peak and 1 / total. Past stop they make P = 0."""
    mask = i < stop
    lse = tl.load(LSE + i, mask=mask, other=float("inf")) if MASKED else tl.load(LSE + i)
    if IS_SPLIT:
        return lse, load_row(LSE + num_rows + i, mask, MASKED)
    else:
        return lse, lse


@triton.jit
def _weights(exponents, inverse, IS_SPLIT: tl.constexpr):
    """P of S * log2(e) less what _load_sums has loaded."""
    p = tl.math.exp2(exponents)
    return p * inverse if IS_SPLIT else p


@triton.jit
def _back_over_keys(state, owned, walked, start, stop, whole, BLOCK: tl.constexpr, IS_REST: tl.constexpr, const):
    """The loop of backward_rows over the keys; state: dQ / scale in two parts and the sums of the query's slopes."""
    dq, dq2, sum1, sum2, sum3 = state
    q, do, queries, lse, inverse, delta = owned
    k_at, v_at, sequence = walked
    for first in range(start, stop, BLOCK):
        j = _tokens(first, whole, BLOCK, IS_REST, const)
        k = load_features(k_at, j, sequence.length, IS_REST, const)
        v = load_features(v_at, j, sequence.length, IS_REST, const)
        keys = numbers_now(sequence, j, first < stop, IS_REST, const)
        key_mask = load_key_mask(sequence, j, IS_REST, const)
        query, key = _face(down(queries), across(keys), IS_REST, const)
        scores = scores_of(dot_features(q, k, const), query, key, key_mask, sequence, j, IS_REST, const)
        exponents = scores * (sequence.scale * LOG2E) - lse[:, None]
        p = _weights(exponents, inverse[:, None], q[0].dtype == tl.float32)
        ds = p * (dot_features(do, v, const) - delta[:, None])
        if const.FORMULA != "none":
            slope1, slope2, slope3, _ = slopes(only_placed(ds, key, IS_REST, const), query, key, const)
            sum1 += tl.sum(slope1, 1)
            if const.NUM_NUMBERS > 1:
                sum2 += tl.sum(slope2, 1)
                sum3 += tl.sum(slope3, 1)
        ds = ds.to(k[0].dtype)
        dq = add_dot(dq, ds, k[0], const)
        if const.D2 > 0:
            dq2 = add_dot(dq2, ds, k[1], const)
    return dq, dq2, sum1, sum2, sum3


@triton.jit
def backward_rows(call, const):
    """delta, dQ and the row sums of the numbers' gradients, of BLOCK_Q queries of one head."""
    q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, dq_tensor = call.features
    LSE, DELTA, DNUMBERS = call.rows
    place = place_of(call, tl.cdiv(call.length, const.BLOCK_Q))
    i = place.block * const.BLOCK_Q + tl.arange(0, const.BLOCK_Q)
    k_at, v_at = features_at(k_tensor, place, const), features_at(v_tensor, place, const)
    sequence = sequence_at(call, place, const)
    walked = (k_at, v_at, sequence)
    q = scaled(load_features(features_at(q_tensor, place, const), i, call.length, True, const), call.factor)
    o, o2 = load_features(features_at(o_tensor, place, const), i, call.length, True, const)
    do, do2 = load_features(features_at(do_tensor, place, const), i, call.length, True, const)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if const.D2 > 0:
        delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
    mask = i < call.length
    tl.store(DELTA + place.row + i, delta, mask=mask)
    num_rows, is_split = _num_rows(call, const.BLOCK_Q), q[0].dtype == tl.float32
    lse, inverse = _load_sums(LSE + place.row, num_rows, i, call.length, True, is_split)
    query = load_numbers(sequence, i, True, const)
    zeros, none = tl.zeros([const.BLOCK_Q, const.D1], tl.float32), tl.zeros([const.BLOCK_Q], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_Q, const.D2], tl.float32) if const.D2 > 0 else zeros
    state, owned = (zeros, zeros2, none, none, none), (q, (do, do2), query, lse, inverse, delta)
    state = _walk(_back_over_keys, state, owned, walked, call.length, const.BLOCK_K, const)
    dq, dq2, sum1, sum2, sum3 = state
    scale = call.scale * call.factor
    dq, dq2 = dq * scale, dq2 * scale
    store_features(features_at(dq_tensor, place, const), i, call.length, dq, dq2, const)
    first, second, third = completed(sum1, sum2, sum3, query, call.scale, const)
    if const.NUM_NUMBERS > 0:
        tl.store(DNUMBERS + place.row + i, first * query.flag, mask=mask)
    if const.NUM_NUMBERS > 1:
        tl.store(DNUMBERS + num_rows + place.row + i, second, mask=mask)
        tl.store(DNUMBERS + 2 * num_rows + place.row + i, third, mask=mask)


@triton.jit
def _over_queries(state, owned, walked, start, stop, whole, BLOCK: tl.constexpr, IS_REST: tl.constexpr, const):
    """The loop of backward_columns over the queries, tiles lying (BLOCK_K, BLOCK_Q).

    state: dK / scale and dV in two parts each, and the sums of the key's slopes.
    """
    dk, dk2, dv, dv2, total = state
    k, v, keys, key_mask = owned
    q_at, do_at, LSE, num_rows, DELTA, sequence = walked
    is_split: tl.constexpr = k[0].dtype == tl.float32
    for first in range(start, stop, BLOCK):
        i = _tokens(first, whole, BLOCK, IS_REST, const)
        q = load_features(q_at, i, sequence.length, IS_REST, const)
        do = load_features(do_at, i, sequence.length, IS_REST, const)
        queries = numbers_now(sequence, i, first < stop, IS_REST, const)
        zero = tl.zeros([BLOCK], tl.float32)
        lse, inverse, delta = zero, zero, zero
        if first < stop:  # always, see numbers_now
            lse, inverse = _load_sums(LSE, num_rows, i, sequence.length, IS_REST, is_split)
            delta = load_row(DELTA + i, i < sequence.length, IS_REST)
        key, query = _face(down(keys), across(queries), IS_REST, const)
        scores = add_decay(dot_features(k, q, const), query, key, const)
        if const.HAS_KEY_MASK:
            scores += key_mask[:, None]
        p = _weights(scores * (sequence.scale * LOG2E) - lse[None, :], inverse[None, :], is_split)
        ds = p * (dot_features(v, do, const) - delta[None, :])
        if const.READS_KEYS:
            _, _, _, slope = slopes(only_placed(ds, query, IS_REST, const), query, key, const)
            total += tl.sum(slope, 1)
        p, ds = p.to(do[0].dtype), ds.to(q[0].dtype)
        dv = add_dot(dv, p, do[0], const)
        dk = add_dot(dk, ds, q[0], const)
        if const.D2 > 0:
            dv2 = add_dot(dv2, p, do[1], const)
            dk2 = add_dot(dk2, ds, q[1], const)
    return dk, dk2, dv, dv2, total


@triton.jit
def backward_columns(call, const):
    """dK, dV and the column sums of the numbers' gradient, of BLOCK_K keys of one head; after backward_rows."""
    q_tensor, k_tensor, v_tensor, do_tensor, dk_tensor, dv_tensor = call.features
    LSE, DELTA, DNUMBERS = call.rows
    place = place_of(call, tl.cdiv(call.length, const.BLOCK_K))
    j = place.block * const.BLOCK_K + tl.arange(0, const.BLOCK_K)
    q_at, do_at = features_at(q_tensor, place, const), features_at(do_tensor, place, const)
    sequence = sequence_at(call, place, const)
    walked = (q_at, do_at, LSE + place.row, _num_rows(call, const.BLOCK_K), DELTA + place.row, sequence)
    k = scaled(load_features(features_at(k_tensor, place, const), j, call.length, True, const), call.factor)
    v = load_features(features_at(v_tensor, place, const), j, call.length, True, const)
    key = load_numbers(sequence, j, True, const)
    owned = (k, v, key, load_key_mask(sequence, j, True, const))
    zeros = tl.zeros([const.BLOCK_K, const.D1], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_K, const.D2], tl.float32) if const.D2 > 0 else zeros
    state = (zeros, zeros2, zeros, zeros2, tl.zeros([const.BLOCK_K], tl.float32))
    state = _walk(_over_queries, state, owned, walked, call.length, const.BLOCK_Q, const)
    dk, dk2, dv, dv2, total = state
    scale = call.scale * call.factor
    dk, dk2 = dk * scale, dk2 * scale
    store_features(features_at(dk_tensor, place, const), j, call.length, dk, dk2, const)
    store_features(features_at(dv_tensor, place, const), j, call.length, dv, dv2, const)
    if const.READS_KEYS:
        address = DNUMBERS + place.row + j
        rows = tl.load(address, mask=j < call.length, other=0.0)
        tl.store(address, rows + total * key.flag, mask=j < call.length)
