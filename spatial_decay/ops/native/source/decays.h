// The decays: what is added to the score of a query i and W keys j, and its slope, value and slope side by side.
//
//     M[i, j] = amount * shape          manhattan  (a_i + a_j) * d_M         path  (c_i - c_j) * order
//                       euclidean  (a_i + a_j) * d_E         gaussian   a_i * exp(-(u_i dh^2 + v_i dw^2))
//                         squared  (a_i + a_j) * d_E^2
//
// A new formula: its row in ops/formulas.py and, in the same order, its name in problem.h; its lines in amount, shape
// and Slope here; its loops in the lists of attention.cpp; and how many numbers it reads, where not one, in backward.h.
#pragma once
#include "problem.h"

namespace {

// What a query and W keys have of their Tokens (problem.h); u and v, a Gaussian's other numbers, base 2.
struct Row {
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

INLINE vf step_h(const Row& row, const Keys& keys) { return keys.h - row.h; }
INLINE vf step_w(const Row& row, const Keys& keys) { return keys.w - row.w; }
INLINE vf square_up_to(vf x, float most) { return minimum(x * x, splat(most)); }

// Where one of the two lies nowhere: 0. A Gaussian's come from fill_shapes.
template <Formula F>
INLINE vf shape(const Row& row, const Keys& keys) {
  const vi both = keys.lies & row.lies;
  const vf h = step_h(row, keys), w = step_w(row, keys);
  if (F == MANHATTAN) return masked(h, both) + masked(w, both);  // its `lies` takes the sign away too: |dh| + |dw|
  if (F == EUCLIDEAN) return masked(root(h * h + w * w), both);
  if (F == SQUARED) return masked(h * h + w * w, both);
  return masked(maximum(splat(-1.0f), minimum(splat(1.0f), w)), both);  // -1, 0 or 1
}

template <Formula F>
INLINE vf amount(const Row& row, const Keys& keys) {
  return is_a_path(F) ? row.t - keys.t : F == GAUSSIAN ? splat(row.t) : keys.t + row.t;
}

// Of the scores, base 2: adds the decay. A causal query may not attend to what comes later.
template <Formula F>
INLINE vf with_decay(vf score, const Row& row, const Keys& keys, vf shape) {
  if (F == NONE) return score;
  const vf y = score + amount<F>(row, keys) * (is_a_path(F) ? shape * LOG2E : shape);
  return F == CAUSAL_PATH ? select((vi)(shape > vf{}), splat(NOTHING), y) : y;
}

// What dS says of the numbers, of one query and all keys seen so far.
//
//     manhattan  da_i += dS d_M, da_j += dS d_M        path  dc_i += dS order, dc_j -= dS order
//     euclidean, squared as manhattan, with their distances
//     gaussian   da_i += dS e, du_i -= dS a e dh^2, dv_i -= dS a e dw^2, with e the shape
template <Formula F>
struct Slope {
  vf t = vf{}, u = vf{}, v = vf{};
  // Adds dS; what falls to the keys is added to of_keys. The factor -a of a Gaussian's u and v comes later.
  __attribute__((always_inline)) void add(vf ds, vf shape, const Row& row, const Keys& keys, float max_square,
                                          vf* of_keys) {
    const vf z = ds * shape;
    t += z;
    if (F == GAUSSIAN) {
      u += z * square_up_to(step_h(row, keys), max_square);
      v += z * square_up_to(step_w(row, keys), max_square);
    } else {
      *of_keys += z;
    }
  }
};

// A Gaussian's shapes cost exponentials. So they are made before the pass that reads them.
struct Shapes {
  float* data;    // (GROUP, n), rows `stride` apart
  float* counts;  // 0, 1, 2, ...: the rows, or columns, of a grid
  float *h, *w;   // a query's factors: of each row and of each column of the grid
  int64_t stride;
};

INLINE void take_shapes(Scratch& scratch, const Problem& p, int64_t rows, int64_t keys, Shapes* out) {
  const int64_t stride = keys + 2 * W, longest = (p.height > p.width ? p.height : p.width) + 2 * W;
  const bool is_needed = p.formula == GAUSSIAN;
  *out = {scratch.take(is_needed ? rows * stride : 0), scratch.take(is_needed ? longest : 0),
          scratch.take(is_needed ? longest : 0), scratch.take(is_needed ? longest : 0), stride};
  for (int64_t i = 0; is_needed && scratch.memory && i < longest; i++) out->counts[i] = (float)i;
}

// exp(-(u dh^2 + v dw^2)) of a query and the keys j .. j + n - 1. On a grid it is a product: H + W exponentials a query.
void fill_shapes(const Problem& p, const Row& row, const Tokens& tokens, int64_t j, int64_t n, float max_square,
                 const Shapes& shapes, float* out) {
  if (!row.lies || p.positions) {
    for (int64_t x = 0; x < n; x += W) {
      const Keys keys = keys_at(tokens, j + x);
      const vf h = square_up_to(step_h(row, keys), max_square), w = square_up_to(step_w(row, keys), max_square);
      store(out + x, masked(exp2v(-(h * row.u + w * row.v)), keys.lies & row.lies));
    }
    return;
  }
  for (int64_t y = 0; y < p.height; y += W)
    store(shapes.h + y, exp2v(square_up_to(load(shapes.counts + y) - row.h, max_square) * -row.u));
  for (int64_t y = 0; y < p.width; y += W)
    store(shapes.w + y, exp2v(square_up_to(load(shapes.counts + y) - row.w, max_square) * -row.v));
  int64_t x = 0;
  for (; x < n && j + x < p.prefix; x++) out[x] = 0;
  int64_t h = (j + x - p.prefix) / p.width, w = (j + x - p.prefix) % p.width;
  // The rest of a line, then whole ones. The last vector of a line runs over its end: the next line writes there again,
  // and `out` has room for that of the last.
  for (; x < n && h < p.height; x += p.width - w, w = 0, h++)
    for (int64_t y = w; y < p.width && x + y - w < n; y += W)
      store(out + x + y - w, load(shapes.w + y) * shapes.h[h]);
  for (x = least(x, n); x < n; x++) out[x] = 0;
}

}  // namespace
