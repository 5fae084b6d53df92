// The gradients of Q, K, V and of the decay's numbers, from dO, O and what forward left of each row of scores.
//
// With P the softmax, computed again, and o the product by elements:
//
//     P = 2^(S - peak - log2 sum)      dP = dO V^T      dS = P o (dP - delta),  delta = rows of (dO o O)
//     dV = P^T dO        dK = scale * dS^T Q        dQ = scale * dS K        numbers: Slope in decays.h
//
// One thread has some keys of a sequence and walks all queries. dV and dK are its own; dQ and the numbers' gradients of
// several threads are added up at the end, in their order: results repeat bit for bit. Peak and sum come apart: a peak
// of 1e8 and a logarithm of 3 have no sum in float32.
#pragma once
#include "forward.h"

namespace {

constexpr int64_t BACKWARD_KEYS = 256, BACKWARD_QUERIES = 48;
// Whether S comes out as in forward, bit for bit, so that none is above its peak. What tiles add up in their own order
// may be, by some 1e-7 of S, which is much where S is 1e9.
#if defined(__AMX_BF16__)
constexpr bool ROUNDS_ALIKE = false;
#else
constexpr bool ROUNDS_ALIKE = true;
#endif

// P and dS of GROUP queries and the keys from j on: s holds S without decay and becomes P, ds holds dP and becomes dS.
template <Formula F>
void differentiate(float* s, float* ds, int64_t lds, const Row* rows, const float* peak, const float* log_sum,
                   const float* delta, int64_t j, int64_t n, const Tokens& tokens, const Shapes& shapes,
                   float max_square, Slope<F>* slopes, float* of_keys) {
  Row row[GROUP];
  Slope<F> slope[GROUP];
  UNROLL for (int r = 0; r < GROUP; r++) row[r] = rows[r];
  for (int64_t x = 0; x < n; x += W) {
    const Keys keys = keys_at(tokens, j + x);
    vf down = vf{};
    UNROLL for (int r = 0; r < GROUP; r++) {
      const vf m = F == NONE       ? vf{}
                   : F == GAUSSIAN ? load(shapes.data + r * shapes.stride + x)
                                   : shape<F>(row[r], keys);
      const vf y = with_decay<F>(load(s + r * lds + x), row[r], keys, m);
      const vf below = (y - peak[r]) - log_sum[r];
      const vf p = exp2v(ROUNDS_ALIKE ? below : minimum(vf{}, below));
      const vf g = p * (load(ds + r * lds + x) - delta[r]);
      store(s + r * lds + x, p);
      store(ds + r * lds + x, g);
      if (F != NONE) slope[r].add(g, m, row[r], keys, max_square, &down);
    }
    if (F != NONE && F != GAUSSIAN) store(of_keys + x, load(of_keys + x) + down);
  }
  UNROLL for (int r = 0; r < GROUP; r++) slopes[r] = slope[r];
}

template <Formula F>
void backward(int64_t, int64_t, void* context) {
  Task& task = *(Task*)context;
  const Problem& p = task.p;
  constexpr int64_t QB = BACKWARD_QUERIES, M = F == NONE ? 0 : F == GAUSSIAN ? 3 : 1;
  const int64_t L = p.length, d = p.dim, dp = up(d, W), padded = up(L, W), rows = up(L, GROUP);
  const int64_t num_sequences = p.batch * p.lines * p.heads;
  const int64_t wanted = task.parts * up(padded / task.parts, BACKWARD_KEYS) / BACKWARD_KEYS;  // blocks of keys
  const int64_t keys = up((padded + wanted - 1) / wanted, W), lds = keys + W, num_blocks = (padded + keys - 1) / keys;
  const float scale = (float)p.scale, scale2 = (float)(p.scale * LOG2E), one = 1, ln2 = LN2;
  const float max_square = (float)(p.max_step * p.max_step);

  float *q, *grad, *dq, *peak, *log_sum, *delta, *kt, *vt, *k, *dk, *dv, *s, *ds, *of_keys, *of_rows[3];
  Tokens tokens;
  Shapes shapes;
  Scratch scratch;
  const bool has_memory = scratch.allocate([&](Scratch& scratch) {
    q = scratch.take(rows * dp), grad = scratch.take(rows * dp), dq = scratch.take(rows * dp);
    peak = scratch.take(rows), log_sum = scratch.take(rows), delta = scratch.take(rows);
    for (int64_t m = 0; m < 3; m++) of_rows[m] = scratch.take(m < M ? rows : 0);
    kt = scratch.take(keys * dp), vt = scratch.take(keys * dp), k = scratch.take(keys * dp);
    dk = scratch.take(keys * dp), dv = scratch.take(keys * dp), of_keys = scratch.take(keys);
    s = scratch.take(QB * lds), ds = scratch.take(QB * lds);
    take_tokens(scratch, padded + BACKWARD_KEYS, &tokens);
    take_shapes(scratch, p, GROUP, keys, &shapes);
  });
  if (!has_memory) return task.fail();
  NoSubnormals no_subnormals;

  Items item(task);
  while (item.take()) {
    const Sequence at = item.at;
    const int64_t part = item.part, sequence = item.sequence;
    if (item.has_new_image) read_positions(p, at, padded + BACKWARD_KEYS, tokens);
    if (item.has_new_sequence) {
      pack(features(p, p.q, p.q_strides, at), 0, L, rows, d, dp, scale2, q);
      pack(features(p, p.grad, p.grad_strides, at), 0, L, rows, d, dp, 1.0f, grad);
      pack(features(p, p.out, p.out_strides, at), 0, L, rows, d, dp, 1.0f, dq);  // O; dq is free until then
      for (int64_t i = 0; i < rows; i++) {
        vf dot = vf{};
        for (int64_t x = 0; x < dp; x += W) dot += load(grad + i * dp + x) * load(dq + i * dp + x);
        delta[i] = sum(dot);
        peak[i] = i < L ? p.rows[sequence * L + i] : -NOTHING;
        log_sum[i] = i < L ? p.rows[(num_sequences + sequence) * L + i] : 0;
      }
      read_tokens(p, at, padded, tokens);
    }
    float* dnumbers[3];  // of this part, (M, L)
    for (int64_t m = 0; m < M; m++) {
      dnumbers[m] = task.dnumber_parts ? task.dnumber_parts + (item.index * M + m) * L
                                       : p.dnumbers + (m * num_sequences + sequence) * L;
      memset(of_rows[m], 0, rows * 4);
      memset(dnumbers[m], 0, L * 4);
    }
    const int64_t from = part * num_blocks / task.parts, to = (part + 1) * num_blocks / task.parts;
    if (from == to) memset(dq, 0, rows * dp * 4);  // a part without keys
    for (int64_t block = from; block < to; block++) {
      const int64_t j = block * keys, n = least(keys, padded - j), real = least(n, L - j);  // `real` keys exist
      pack(features(p, p.v, p.v_strides, at), j, real, n, d, dp, 1.0f, k);
      pack_transposed(k, n, d, dp, vt);
      pack(features(p, p.k, p.k_strides, at), j, real, n, d, dp, 1.0f, k);
      pack_transposed(k, n, d, dp, kt);
      memset(of_keys, 0, n * 4);
      for (int64_t i = 0; i < rows; i += QB) {
        const int64_t m = least(QB, rows - i);
        Start start = {tokens.bias + j, 0};
        if (has_pair_mask(p)) {
          for (int64_t r = 0; r < m; r++) read_mask(p, at, least(i + r, L - 1), j, n, s + r * lds);
          start = {s, lds};
        }
        product_with_panels(m, n, d, q + i * dp, dp, kt, start, s, lds);
        product_with_panels(m, n, d, grad + i * dp, dp, vt, FROM_ZERO, ds, lds);
        for (int64_t r = 0; r < m; r += GROUP) {
          Row group[GROUP];
          Slope<F> slopes[GROUP];
          for (int64_t g = 0; g < GROUP; g++) {
            group[g] = row_of(p, at, tokens, least(i + r + g, L - 1));
            if (F == GAUSSIAN)
              fill_shapes(p, group[g], tokens, j, n, max_square, shapes, shapes.data + g * shapes.stride);
          }
          differentiate<F>(s + r * lds, ds + r * lds, lds, group, peak + i + r, log_sum + i + r, delta + i + r, j, n,
                           tokens, shapes, max_square, slopes, of_keys);
          for (int64_t g = 0; g < GROUP && M > 0; g++) {
            of_rows[0][i + r + g] += sum(slopes[g].t);
            if (M < 3) continue;
            of_rows[1][i + r + g] -= sum(slopes[g].u) * group[g].t * LN2;  // t is base 2
            of_rows[2][i + r + g] -= sum(slopes[g].v) * group[g].t * LN2;
          }
        }
        product<true>(n, dp, m, s, lds, grad + i * dp, dp, i ? Start{dv, dp} : FROM_ZERO, dv, dp);
        product<true>(n, dp, m, ds, lds, q + i * dp, dp, i ? Start{dk, dp} : FROM_ZERO, dk, dp);
        float* of_q = dq + i * dp;
        product<false>(m, dp, n, ds, lds, k, dp, block > from ? Start{of_q, dp} : FROM_ZERO, of_q, dp);
      }
      unpack(dv, dp, real, d, &one, 0, features(p, p.dv, p.dv_strides, at), j);
      // q holds scale * log2(e) * Q, dK has no log2(e).
      unpack(dk, dp, real, d, &ln2, 0, features(p, p.dk, p.dk_strides, at), j);
      for (int64_t x = 0; x < real && M == 1; x++) dnumbers[0][j + x] += adds(F) ? of_keys[x] : -of_keys[x];
    }
    for (int64_t m = 0; m < M; m++)
      for (int64_t i = 0; i < L; i++) dnumbers[m][i] += of_rows[m][i];
    const Features of_dq = task.dq_parts ? Features{task.dq_parts + item.index * L * d, d, FLOAT32}
                                         : features(p, p.dq, p.dq_strides, at);
    unpack(dq, dp, L, d, &scale, 0, of_dq, 0);
  }
}

// The sums over the parts of the sequences from `begin` on, in the order of the parts.
void gather(int64_t begin, int64_t end, void* context) {
  const Task& task = *(Task*)context;
  const Problem& p = task.p;
  const int64_t L = p.length, d = p.dim, num_sequences = p.batch * p.lines * p.heads;
  const int64_t M = p.formula == NONE ? 0 : p.formula == GAUSSIAN ? 3 : 1;
  const float one = 1;
  for (int64_t sequence = begin; sequence < end; sequence++) {
    float* dq = task.dq_parts + sequence * task.parts * L * d;
    for (int64_t part = 1; part < task.parts; part++)
      for (int64_t x = 0; x < L * d; x++) dq[x] += dq[part * L * d + x];
    unpack(dq, d, L, d, &one, 0, features(p, p.dq, p.dq_strides, sequence_of(p, sequence)), 0);
    for (int64_t m = 0; m < M; m++)
      for (int64_t i = 0; i < L; i++) {
        float total = 0;
        for (int64_t part = 0; part < task.parts; part++)
          total += task.dnumber_parts[((sequence * task.parts + part) * M + m) * L + i];
        p.dnumbers[(m * num_sequences + sequence) * L + i] = total;
      }
  }
}

}  // namespace
