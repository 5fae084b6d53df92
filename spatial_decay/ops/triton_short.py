"""Triton kernels for short sequences, for instance the rows and columns of a grid: one program holds a whole one.

The equations are those of triton_kernels.py. With all keys of a query at hand the softmax is an ordinary one, and the
backward pass computes it anew: nothing is saved but the inputs, and one kernel gives all gradients.

Tensors are (B, O, N, L, d) with any strides: O counts the rows or the columns of the grid, so that neither is copied.
"""

import triton
import triton.language as tl

from spatial_decay.ops.triton_tiles import (
    LOG2E,
    LOWEST,
    NONE,
    dot,
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

__all__ = ["backward", "forward"]


@triton.jit
def _softmax(
    q, k, TOKENS, KEY_BIAS, POSITIONS, token_strides, key_bias_stride, index, length, scale,
    KIND: tl.constexpr, D2: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P (BLOCK, BLOCK) before it is divided by its row sums, the inverses of these sums, and the tokens."""
    tokens = load_tokens(TOKENS, token_strides, POSITIONS, index, length, scale, KIND, 0, False, True)
    key_bias = load_key_bias(KEY_BIAS, key_bias_stride, index, length, scale, HAS_KEY_BIAS, True)
    products = dot_features(q[0], q[1], k[0], k[1], D2, UPCAST)
    scores = scores_of(products, tokens, tokens, key_bias, index, length, KIND, False, False, HAS_KEY_BIAS, True)
    peak = tl.maximum(tl.max(scores, 1), LOWEST)
    p = tl.math.exp2(scores * (scale * LOG2E) - (peak * (scale * LOG2E))[:, None])
    total = tl.sum(p, 1)
    return p, 1.0 / tl.where(total == 0.0, 1.0, total), tokens


@triton.jit
def forward(
    Q, K, V, O, TOKENS, KEY_BIAS, POSITIONS, q_strides, k_strides, v_strides, o_strides, token_strides,
    key_bias_strides, num_outer, num_heads, length, scale,
    KIND: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """O of one head of one sequence."""
    q_strides = in_elements(q_strides, UNIT)
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    o_strides = in_elements(o_strides, UNIT)
    _, image, line, head = sequence_of(tl.program_id(0), 1, num_heads, num_outer)
    index = tl.arange(0, BLOCK)
    q = load_features(Q + offset(q_strides, image, line, head), index, q_strides[3], length, D, D1, D2, True)
    k = load_features(K + offset(k_strides, image, line, head), index, k_strides[3], length, D, D1, D2, True)
    v = load_features(V + offset(v_strides, image, line, head), index, v_strides[3], length, D, D1, D2, True)
    p, inverse, _ = _softmax(
        q, k, TOKENS + token_offset(token_strides, image * num_outer + line, head),
        KEY_BIAS + token_offset(key_bias_strides, image * num_outer + line, head), POSITIONS,
        (token_strides[0], token_strides[3]), key_bias_strides[3], index, length, scale, KIND, D2, HAS_KEY_BIAS, UPCAST,
    )  # fmt: skip
    p = p.to(v[0].dtype)
    out = dot(p, v[0], UPCAST) * inverse[:, None]
    out2 = dot(p, v[1], UPCAST) * inverse[:, None] if D2 > 0 else out
    store_features(O + offset(o_strides, image, line, head), index, o_strides[3], length, out, out2, D, D1, D2)


@triton.jit
def backward(
    Q, K, V, DO, DQ, DK, DV, DTOKENS, TOKENS, KEY_BIAS, POSITIONS, q_strides, k_strides, v_strides, do_strides,
    dq_strides, dk_strides, dv_strides, token_strides, key_bias_strides, num_outer, num_heads, length, scale,
    KIND: tl.constexpr, HAS_KEY_BIAS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All gradients of one head of one sequence; here delta = rowsum(P o dP)."""
    q_strides = in_elements(q_strides, UNIT)
    k_strides = in_elements(k_strides, UNIT)
    v_strides = in_elements(v_strides, UNIT)
    do_strides = in_elements(do_strides, UNIT)
    dq_strides = in_elements(dq_strides, UNIT)
    dk_strides = in_elements(dk_strides, UNIT)
    dv_strides = in_elements(dv_strides, UNIT)
    _, image, line, head = sequence_of(tl.program_id(0), 1, num_heads, num_outer)
    index = tl.arange(0, BLOCK)
    q = load_features(Q + offset(q_strides, image, line, head), index, q_strides[3], length, D, D1, D2, True)
    k = load_features(K + offset(k_strides, image, line, head), index, k_strides[3], length, D, D1, D2, True)
    v = load_features(V + offset(v_strides, image, line, head), index, v_strides[3], length, D, D1, D2, True)
    do = load_features(DO + offset(do_strides, image, line, head), index, do_strides[3], length, D, D1, D2, True)
    p, inverse, tokens = _softmax(
        q, k, TOKENS + token_offset(token_strides, image * num_outer + line, head),
        KEY_BIAS + token_offset(key_bias_strides, image * num_outer + line, head), POSITIONS,
        (token_strides[0], token_strides[3]), key_bias_strides[3], index, length, scale, KIND, D2, HAS_KEY_BIAS, UPCAST,
    )  # fmt: skip
    p = p * inverse[:, None]
    dp = dot_features(do[0], do[1], v[0], v[1], D2, UPCAST)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    if KIND != NONE:
        row, _, _, column = slopes(
            ds, (tokens[0][:, None], tokens[1][:, None], tokens[2][:, None]), tokens[0][None, :],
            tokens[3][:, None], tokens[4][:, None], tokens[3][None, :], tokens[4][None, :], KIND,
        )  # fmt: skip
        both = tl.sum(row, 1) + tl.sum(column, 0)
        address = DTOKENS + row_offset(image, line, head, num_outer, num_heads, length) + index
        tl.store(address, both, mask=index < length)
    p, ds = tl.trans(p.to(do[0].dtype)), ds.to(q[0].dtype)
    ds_t = tl.trans(ds)
    dq, dk, dv = dot(ds, k[0], UPCAST) * scale, dot(ds_t, q[0], UPCAST) * scale, dot(p, do[0], UPCAST)
    dq2, dk2, dv2 = dq, dk, dv
    if D2 > 0:
        dq2, dk2, dv2 = dot(ds, k[1], UPCAST) * scale, dot(ds_t, q[1], UPCAST) * scale, dot(p, do[1], UPCAST)
    store_features(DQ + offset(dq_strides, image, line, head), index, dq_strides[3], length, dq, dq2, D, D1, D2)
    store_features(DK + offset(dk_strides, image, line, head), index, dk_strides[3], length, dk, dk2, D, D1, D2)
    store_features(DV + offset(dv_strides, image, line, head), index, dv_strides[3], length, dv, dv2, D, D1, D2)
