// The decays: what is added to the score of a query i and W keys j, and its slope, value and slope side by side.
//
//     M[i, j] = amount * shape          manhattan  (a_i + a_j) * d_M         path  (c_i - c_j) * order
//                                       gaussian   a_i * exp(-(u_i dh^2 + v_i dw^2))
//
// A new formula: its name in problem.h and formulas.py, and its lines in amount, shape and Slope.
#pragma once
#include "problem.h"

namespace {

struct Row {  // a query
  float h, w, t, u, v;
  int32_t lies;
};

struct Keys {
  vf h, w, t;
  vi lies;
};

// Numbers are base 2 here, so that 2^(score + M) needs no product more. Those of a path are not: they are sums of many
// tokens, and the difference of two neighbours' is exact, that of two rounded products is not.
INLINE Row row_of(const Problem& p, Sequence s, const Tokens& tokens, int64_t i) {
  Row row = {tokens.h[i], tokens.w[i], tokens.t[i], 0, 0, tokens.lies[i]};
  if (p.formula == GAUSSIAN && row.lies) {
    row.u = numbers(p, s, 1)[i * p.number_strides[3]] * LOG2E;
    row.v = numbers(p, s, 2)[i * p.number_strides[3]] * LOG2E;
  }
  return row;
}

INLINE Keys keys_at(const Tokens& tokens, int64_t j) {
  return {load(tokens.h + j), load(tokens.w + j), load(tokens.t + j), load(tokens.lies + j)};
}

struct Step {
  vf h, w;
};

// From the query to the keys; where one of them lies nowhere, what comes of it is masked later.
INLINE Step step_to(const Row& row, const Keys& keys) { return {keys.h - row.h, keys.w - row.w}; }

INLINE vf size_up_to(vf x, vf most) { return minimum((vf)((vi)x & 0x7fffffff), most); }

template <Formula F>
INLINE vf shape(const Row& row, const Keys& keys, Step step, vf max_step) {
  const vi both = keys.lies & row.lies;
  if (F == MANHATTAN) return masked(step.h, both) + masked(step.w, both);  // `lies` has no sign: |dh| + |dw|
  if (F == GAUSSIAN) {
    const vf h = size_up_to(step.h, max_step), w = size_up_to(step.w, max_step);
    return masked(exp2v(-(h * h * row.u + w * w * row.v)), both);
  }
  return masked(maximum(splat(-1.0f), minimum(splat(1.0f), step.w)), both);  // places are whole numbers
}

template <Formula F>
INLINE vf amount(const Row& row, const Keys& keys) {
  return F == MANHATTAN ? keys.t + row.t : F == GAUSSIAN ? splat(row.t) : row.t - keys.t;
}

// Of the scores, base 2: adds the decay. A causal query may not attend to what comes later.
template <Formula F>
INLINE vf with_decay(vf score, const Row& row, const Keys& keys, vf shape) {
  if (F == NONE) return score;
  const vf y = score + amount<F>(row, keys) * (F == PATH || F == CAUSAL_PATH ? shape * LOG2E : shape);
  return F == CAUSAL_PATH ? select((vi)(shape > vf{}), splat(NOTHING), y) : y;
}

// What dS says of the numbers, of one query and all keys seen so far.
//
//     manhattan  da_i += dS d_M, da_j += dS d_M        path  dc_i += dS order, dc_j -= dS order
//     gaussian   da_i += dS e, du_i -= dS a e dh^2, dv_i -= dS a e dw^2, with e the shape
template <Formula F>
struct Slope {
  vf t = vf{}, u = vf{}, v = vf{};
  // Adds dS; the sum over queries for each key goes to of_keys.
  __attribute__((always_inline)) void add(vf ds, vf shape, Step step, vf max_step, vf* of_keys) {
    const vf z = ds * shape;
    t += z;
    if (F != GAUSSIAN) *of_keys += z;
    if (F != GAUSSIAN) return;
    const vf h = size_up_to(step.h, max_step), w = size_up_to(step.w, max_step);
    u += z * (h * h), v += z * (w * w);
  }
};

}  // namespace
