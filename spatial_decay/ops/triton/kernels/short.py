"""Triton kernels for short sequences, for instance the rows and columns of a grid: one program holds a whole one.

The equations are those of long.py. With all keys of a query at hand the softmax is an ordinary one, and the backward
pass computes it anew: nothing is saved but the inputs, and one kernel gives all gradients.

    O = softmax(S) V        dS = P o (dP - rowsum(P o dP))

Tensors are (B, O, N, L, d) with any strides: O counts the rows or the columns of the grid, so that neither is copied.
"""

import triton
import triton.language as tl

from spatial_decay.ops.triton.kernels.pairs import (
    across,
    completed,
    down,
    load_key_mask,
    load_numbers,
    product,
    scores_of,
    slopes,
)
from spatial_decay.ops.triton.kernels.tiles import (
    LOG2E,
    LOWEST_PEAK,
    dot,
    dot_features,
    features_at,
    load_features,
    place_of,
    scaled,
    sequence_at,
    store_features,
)

__all__ = ["backward", "forward"]


@triton.jit
def _softmax(q, k, numbers, sequence, index, const):
    """P (L, L) before it is divided by its row sums, and the inverses of these sums."""
    key_mask = load_key_mask(sequence, index, True, const)
    scores = scores_of(
        dot_features(q, k, const), down(numbers), across(numbers), key_mask, sequence, index, True, const
    )
    to_log2 = sequence.scale * LOG2E
    peak = tl.maximum(tl.max(scores, 1) * to_log2, LOWEST_PEAK)
    p = tl.math.exp2(scores * to_log2 - peak[:, None])
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def forward(call, const):
    """O of one head of one sequence."""
    q_tensor, k_tensor, v_tensor, o_tensor = call.features
    place = place_of(call, 1)
    index = tl.arange(0, const.BLOCK_Q)
    q = scaled(load_features(features_at(q_tensor, place, const), index, call.length, True, const), call.factor)
    k = load_features(features_at(k_tensor, place, const), index, call.length, True, const)
    v = load_features(features_at(v_tensor, place, const), index, call.length, True, const)
    sequence = sequence_at(call, place, const)
    numbers = load_numbers(sequence, index, True, const)
    p, inverse = _softmax(q, k, numbers, sequence, index, const)
    p = p.to(v[0].dtype)
    out = dot(p, v[0], const) * inverse[:, None]
    out2 = dot(p, v[1], const) * inverse[:, None] if const.D2 > 0 else out
    store_features(features_at(o_tensor, place, const), index, call.length, out, out2, const)


@triton.jit
def backward(call, const):
    """All gradients of one head of one sequence."""
    q_tensor, k_tensor, v_tensor, do_tensor, dq_tensor, dk_tensor, dv_tensor = call.features
    DNUMBERS = call.rows[0]
    place = place_of(call, 1)
    index = tl.arange(0, const.BLOCK_Q)
    q = scaled(load_features(features_at(q_tensor, place, const), index, call.length, True, const), call.factor)
    k = load_features(features_at(k_tensor, place, const), index, call.length, True, const)
    v = load_features(features_at(v_tensor, place, const), index, call.length, True, const)
    do = load_features(features_at(do_tensor, place, const), index, call.length, True, const)
    sequence = sequence_at(call, place, const)
    numbers = load_numbers(sequence, index, True, const)
    p, inverse = _softmax(q, k, numbers, sequence, index, const)
    p = p * inverse[:, None]
    dp = dot_features(do, v, const)
    ds = p * (dp - tl.sum(product(p, dp), 1)[:, None])
    if const.NUM_NUMBERS > 0:  # here one at most
        row, _, _, column = slopes(ds, down(numbers), across(numbers), const)
        dnumbers, _, _ = completed(tl.sum(row, 1), 0.0, 0.0, numbers, call.scale, const)
        if const.READS_KEYS:
            dnumbers += tl.sum(column, 0)
        tl.store(DNUMBERS + place.row + index, dnumbers, mask=index < call.length)
    p, ds = tl.trans(p.to(do[0].dtype)), ds.to(q[0].dtype)
    ds_t = tl.trans(ds)
    # q is multiplied by the factor already.
    of_q, of_k = call.scale * call.factor, call.scale
    dq, dk, dv = dot(ds, k[0], const) * of_q, dot(ds_t, q[0], const) * of_k, dot(p, do[0], const)
    dq2, dk2, dv2 = dq, dk, dv
    if const.D2 > 0:
        dq2, dk2 = dot(ds, k[1], const) * of_q, dot(ds_t, q[1], const) * of_k
        dv2 = dot(p, do[1], const)
    store_features(features_at(dq_tensor, place, const), index, call.length, dq, dq2, const)
    store_features(features_at(dk_tensor, place, const), index, call.length, dk, dk2, const)
    store_features(features_at(dv_tensor, place, const), index, call.length, dv, dv2, const)
