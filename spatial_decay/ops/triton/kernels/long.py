"""Triton kernels of attention with a decay, and of its gradients, for sequences of any length (SDT Eq. 10).

    O = softmax(S) V,    S = scale * Q K^T + M

Forward: one program owns BLOCK_Q queries of one head and walks over all keys, BLOCK_K at a time. It keeps the largest
score so far (peak), the sum of the weights (total) and the weighted sum of the values (out), and scales the last two
down whenever peak grows. No L x L matrix is ever stored; for the backward pass one number a query is kept,

    lse_i = log2 sum_j exp(S_ij),    so that    P_ij = exp2(S_ij * log2(e) - lse_i).

Backward: with dO the output's gradient and o the product by elements,

    dP = dO V^T        delta_i = sum_d dO_id O_id        dS = P o (dP - delta)
    dV = P^T dO        dQ = scale * dS K                 dK = scale * dS^T Q

and for a number t of each token, dt_i = sum_j dS_ij dM_ij/dt_i + sum_j dS_ji dM_ji/dt_i. The first sum belongs to the
programs that own queries (backward_rows, with delta and dQ), the second to those that own keys (backward_columns, with
dK and dV), which add theirs to what the first wrote. So nothing is added atomically, and results repeat bit for bit.

Inside, scores are Q K^T + M / scale: scale comes in once, within exp2. All sums are float32, because half precision has
too few bits for sums of hundreds of terms. Lanes past the end of a sequence are loaded as 0 and never stored; as keys
they get the score -inf, as queries lse = +inf: in both cases P = 0.

Prefix tokens have no position: M = 0 wherever they take part. On the side that is walked over they are a small block of
their own without decay; on the other, all numbers are 0 to them (beside). Where such tokens may be anywhere
(Positions), each has a flag, and all numbers are 0 to them on both sides.

Tensors are (B, O, N, L, d): O counts the rows or columns of a grid where these are the sequences, and is 1 otherwise.
"""

import triton
import triton.language as tl

from spatial_decay.ops.triton.kernels.tiles import (
    LOG2E,
    LOWEST,
    across,
    add_decay,
    add_dot,
    beside,
    completed,
    dot_features,
    down,
    features_at,
    load_features,
    load_key_mask,
    load_numbers,
    load_row,
    only_placed,
    place_of,
    scores_of,
    sequence_at,
    slopes,
    store_features,
    walked_numbers,
)

__all__ = ["backward_columns", "backward_rows", "forward"]


@triton.jit
def _walk(LOOP: tl.constexpr, state, owned, walked, length, BLOCK: tl.constexpr, const):
    """LOOP over all tokens: those of the prefix, the others in whole blocks, and a last block as small as can be."""
    if const.NUM_PREFIX > 0:
        state = LOOP(state, owned, walked, 0, const.NUM_PREFIX, "none", const.PREFIX_BLOCK, True, const)
    whole = length - (length - const.NUM_PREFIX) % BLOCK
    state = LOOP(state, owned, walked, const.NUM_PREFIX, whole, const.FORMULA, BLOCK, False, const)
    if const.TAIL_BLOCK > 0:
        state = LOOP(state, owned, walked, whole, length, const.FORMULA, const.TAIL_BLOCK, True, const)
    return state


@triton.jit
def _face(owned, walked, const):
    """Numbers of the side that a program owns and of that which it walks over, as they stand to each other."""
    faced = beside(owned, walked.flag, const.HAS_FLAGS)
    return faced, beside(walked, owned.flag, const.NUM_PREFIX > 0 or const.HAS_FLAGS)


@triton.jit
def _over_keys(
    state, owned, walked, start, stop, FORMULA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, const
):
    """The loop of forward over the keys start .. stop - 1; state: out in two parts, total and peak."""
    out, out2, total, peak = state
    q, queries = owned
    k_at, v_at, sequence = walked
    to_log2 = sequence.scale * LOG2E
    for first in range(start, stop, BLOCK):
        j = first + tl.arange(0, BLOCK)
        k = load_features(k_at, j, stop, MASKED, const)
        keys = walked_numbers(sequence, j, first, stop, FORMULA, MASKED, const)
        key_mask = load_key_mask(sequence, j, stop, MASKED, const)
        query, key = _face(down(queries), across(keys), const)
        scores = scores_of(dot_features(q, k, const), query, key, key_mask, j, stop, FORMULA, MASKED, const)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.math.exp2(scores * to_log2 - (new_peak * to_log2)[:, None])
        shrink = tl.math.exp2((peak - new_peak) * to_log2)
        total = total * shrink + tl.sum(p, 1)
        v, v2 = load_features(v_at, j, stop, MASKED, const)
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
    q = load_features(features_at(q_tensor, place, const), i, call.length, True, const)
    owned = (q, load_numbers(sequence, i, const.FORMULA, const.NUM_PREFIX, True, const))
    zeros = tl.zeros([const.BLOCK_Q, const.D1], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_Q, const.D2], tl.float32) if const.D2 > 0 else zeros
    state = (zeros, zeros2, tl.zeros([const.BLOCK_Q], tl.float32), tl.full([const.BLOCK_Q], LOWEST, tl.float32))
    out, out2, total, peak = _walk(_over_keys, state, owned, walked, call.length, const.BLOCK_K, const)
    # A query that may attend to nothing: O = 0, and lse = +inf makes P = 0 in the backward pass.
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    inverse = tl.where(is_empty, 0.0, 1.0 / total)
    lse = tl.where(is_empty, float("inf"), peak * (call.scale * LOG2E) + tl.math.log2(total))
    out, out2 = out * inverse[:, None], out2 * inverse[:, None]
    store_features(features_at(o_tensor, place, const), i, call.length, out, out2, const)
    tl.store(call.rows[0] + place.row + i, lse, mask=i < call.length)


@triton.jit
def _back_over_keys(
    state, owned, walked, start, stop, FORMULA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, const
):
    """The loop of backward_rows over the keys; state: dQ / scale in two parts and the sums of the query's slopes."""
    dq, dq2, sum1, sum2, sum3 = state
    q, do, queries, lse, delta = owned
    k_at, v_at, sequence = walked
    for first in range(start, stop, BLOCK):
        j = first + tl.arange(0, BLOCK)
        k = load_features(k_at, j, stop, MASKED, const)
        v = load_features(v_at, j, stop, MASKED, const)
        keys = walked_numbers(sequence, j, first, stop, FORMULA, MASKED, const)
        key_mask = load_key_mask(sequence, j, stop, MASKED, const)
        query, key = _face(down(queries), across(keys), const)
        scores = scores_of(dot_features(q, k, const), query, key, key_mask, j, stop, FORMULA, MASKED, const)
        p = tl.math.exp2(scores * (sequence.scale * LOG2E) - lse[:, None])
        ds = p * (dot_features(do, v, const) - delta[:, None])
        if FORMULA != "none":
            slope1, slope2, slope3, _ = slopes(only_placed(ds, key, const), query, key, FORMULA, const)
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
    num_blocks = tl.cdiv(call.length, const.BLOCK_Q)
    place = place_of(call, num_blocks)
    i = place.block * const.BLOCK_Q + tl.arange(0, const.BLOCK_Q)
    k_at, v_at = features_at(k_tensor, place, const), features_at(v_tensor, place, const)
    sequence = sequence_at(call, place, const)
    walked = (k_at, v_at, sequence)
    q = load_features(features_at(q_tensor, place, const), i, call.length, True, const)
    o, o2 = load_features(features_at(o_tensor, place, const), i, call.length, True, const)
    do, do2 = load_features(features_at(do_tensor, place, const), i, call.length, True, const)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if const.D2 > 0:
        delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
    mask = i < call.length
    tl.store(DELTA + place.row + i, delta, mask=mask)
    lse = tl.load(LSE + place.row + i, mask=mask, other=float("inf"))
    query = load_numbers(sequence, i, const.FORMULA, const.NUM_PREFIX, True, const)
    zeros, none = tl.zeros([const.BLOCK_Q, const.D1], tl.float32), tl.zeros([const.BLOCK_Q], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_Q, const.D2], tl.float32) if const.D2 > 0 else zeros
    state, owned = (zeros, zeros2, none, none, none), (q, (do, do2), query, lse, delta)
    state = _walk(_back_over_keys, state, owned, walked, call.length, const.BLOCK_K, const)
    dq, dq2, sum1, sum2, sum3 = state
    dq, dq2 = dq * call.scale, dq2 * call.scale
    store_features(features_at(dq_tensor, place, const), i, call.length, dq, dq2, const)
    first, second, third = completed(sum1, sum2, sum3, query, call.scale, const.FORMULA)
    if const.NUM_NUMBERS > 0:
        tl.store(DNUMBERS + place.row + i, first * query.flag, mask=mask)
    if const.NUM_NUMBERS > 1:
        size = tl.num_programs(0).to(tl.int64) // num_blocks * call.length  # of each number's gradient, S * N * L
        tl.store(DNUMBERS + size + place.row + i, second, mask=mask)
        tl.store(DNUMBERS + 2 * size + place.row + i, third, mask=mask)


@triton.jit
def _over_queries(
    state, owned, walked, start, stop, FORMULA: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, const
):
    """The loop of backward_columns over the queries, tiles lying (BLOCK_K, BLOCK_Q).

    state: dK / scale and dV in two parts each, and the sums of the key's slopes.
    """
    dk, dk2, dv, dv2, total = state
    k, v, keys, key_mask = owned
    q_at, do_at, LSE, DELTA, sequence = walked
    for first in range(start, stop, BLOCK):
        i = first + tl.arange(0, BLOCK)
        q = load_features(q_at, i, stop, MASKED, const)
        do = load_features(do_at, i, stop, MASKED, const)
        queries = walked_numbers(sequence, i, first, stop, FORMULA, MASKED, const)
        lse, delta = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        if first < stop:
            lse = tl.load(LSE + i, mask=i < stop, other=float("inf"))
            delta = load_row(DELTA + i, i < stop, MASKED)
        key, query = _face(down(keys), across(queries), const)
        scores = add_decay(dot_features(k, q, const), query, key, FORMULA, const)
        if const.HAS_KEY_MASK:
            scores += key_mask[:, None]
        p = tl.math.exp2(scores * (sequence.scale * LOG2E) - lse[None, :])
        ds = p * (dot_features(v, do, const) - delta[None, :])
        if FORMULA != "none" and const.READS_KEYS:
            _, _, _, slope = slopes(only_placed(ds, query, const), query, key, FORMULA, const)
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
    walked = (q_at, do_at, LSE + place.row, DELTA + place.row, sequence)
    k = load_features(features_at(k_tensor, place, const), j, call.length, True, const)
    v = load_features(features_at(v_tensor, place, const), j, call.length, True, const)
    key = load_numbers(sequence, j, const.FORMULA, const.NUM_PREFIX, True, const)
    owned = (k, v, key, load_key_mask(sequence, j, call.length, True, const))
    zeros = tl.zeros([const.BLOCK_K, const.D1], tl.float32)
    zeros2 = tl.zeros([const.BLOCK_K, const.D2], tl.float32) if const.D2 > 0 else zeros
    state = (zeros, zeros2, zeros, zeros2, tl.zeros([const.BLOCK_K], tl.float32))
    state = _walk(_over_queries, state, owned, walked, call.length, const.BLOCK_Q, const)
    dk, dk2, dv, dv2, total = state
    dk, dk2 = dk * call.scale, dk2 * call.scale
    store_features(features_at(dk_tensor, place, const), j, call.length, dk, dk2, const)
    store_features(features_at(dv_tensor, place, const), j, call.length, dv, dv2, const)
    if const.READS_KEYS:
        address = DNUMBERS + place.row + j
        rows = tl.load(address, mask=j < call.length, other=0.0)
        tl.store(address, rows + total * key.flag, mask=j < call.length)
