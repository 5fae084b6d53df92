// O = softmax(scale * Q K^T + M) V, and of each row of scores its peak and the sum of its exponentials.
//
// One thread has some queries of a sequence and walks all keys, a block of them at a time, with an online softmax:
//
//     S = scale * Q K^T + mask, + M           S, M and all exponentials base 2, so that 2^S needs no product more
//     peak' = max(peak, rows of S)            P = 2^(S - peak')
//     sum = sum * 2^(peak - peak') + rows of P         O = O * 2^(peak - peak') + P V
//
// and at the end O / sum. No L x L matrix is stored: a tile of S, ROWS x KEYS, stays in the first cache. floats.h and
// tiles.h compute the products.
#pragma once
#include "decays.h"
#include "floats.h"
#include "tiles.h"

namespace {

constexpr int64_t GROUP = 4;             // queries that share what a pass loads of the keys
constexpr int64_t FORWARD_QUERIES = 96;  // whose outputs are at work together

struct Task {
  const Problem& p;
  int64_t parts;  // of each sequence, that different threads may take
  int64_t next = 0, error = 0;
  float *dq_parts = nullptr, *dnumber_parts = nullptr;

  int64_t num_items() const { return p.batch * p.lines * p.heads * parts; }
  void fail() { __atomic_store_n(&error, 1, __ATOMIC_RELAXED); }
};

// A thread's share of the work: a few neighbours at a time, whose features lie beside each other. Who takes what is left
// to chance: what an item gives does not depend on it.
class Items {
 public:
  int64_t index, part, sequence = -1;  // the item in hand: a part of a sequence
  Sequence at = {-1, 0, 0};
  bool has_new_image, has_new_sequence;  // since the one before

  explicit Items(Task& task) : task(task), count(least(task.p.heads, task.num_items() / (8 * task.p.threads))) {
    if (count < 1 || task.parts > 1) count = 1;
  }
  bool take() {
    if (next == end) next = __atomic_fetch_add(&task.next, count, __ATOMIC_RELAXED), end = next + count;
    index = next++;
    if (index >= task.num_items()) return false;
    const int64_t image = at.image, before = sequence;
    part = index % task.parts, sequence = index / task.parts, at = sequence_of(task.p, sequence);
    has_new_image = at.image != image, has_new_sequence = sequence != before;
    return true;
  }

 private:
  Task& task;
  int64_t count, next = 0, end = 0;
};

// Adds the decay to the scores (GROUP, n) of the keys from j on and finds the largest of each row.
template <Formula F>
void add_decay(float* s, int64_t lds, const Row* rows, int64_t j, int64_t n, const Tokens& tokens,
               const Shapes& shapes, float* peaks) {
  vf peak[GROUP];
  Row row[GROUP];
  UNROLL for (int r = 0; r < GROUP; r++) peak[r] = splat(NOTHING), row[r] = rows[r];
  for (int64_t x = 0; x < n; x += W) {
    const Keys keys = keys_at(tokens, j + x);
    UNROLL for (int r = 0; r < GROUP; r++) {
      const vf m = F == NONE       ? vf{}
                   : F == GAUSSIAN ? load(shapes.data + r * shapes.stride + x)
                                   : shape<F>(row[r], keys);
      const vf y = with_decay<F>(load(s + r * lds + x), row[r], keys, m);
      peak[r] = maximum(peak[r], y);
      if (F != NONE) store(s + r * lds + x, y);
    }
  }
  UNROLL for (int r = 0; r < GROUP; r++) peaks[r] = largest(peak[r]);
}

// s = scale * s + bias, of a row of n.
INLINE void scale_and_mask(float* s, int64_t n, float scale, const float* bias) {
  for (int64_t x = 0; x < n; x += W) store(s + x, load(s + x) * scale + load(bias + x));
}

// 2^(s - peak); the sum.
template <class Arithmetic>
INLINE float exponentiate(const float* s, int64_t n, float peak, typename Arithmetic::Weight* weights) {
  vf total = vf{};
  for (int64_t x = 0; x < n; x += W) {
    const vf p = exp2v(load(s + x) - peak);
    total += p;
    Arithmetic::store_weights(weights + x, p);
  }
  return sum(total);
}

template <Formula F, class Arithmetic>
void forward(int64_t, int64_t, void* context) {
  constexpr int64_t ROWS = Arithmetic::ROWS;
  Task& task = *(Task*)context;
  const Problem& p = task.p;
  Arithmetic products(p.dim, p.length);
  const int64_t L = p.length, dp = products.dp, padded = products.padded, num_sequences = p.batch * p.lines * p.heads;
  const int64_t num_blocks = (padded + Arithmetic::KEYS - 1) / Arithmetic::KEYS;
  // Rows of S are no power of two apart: such rows would have few places of the cache for all of them.
  const int64_t keys = up((padded + num_blocks - 1) / num_blocks, PANEL), lds = keys + W;
  const int64_t queries = up((L + task.parts - 1) / task.parts, ROWS);  // of a part
  const float scale = (float)(p.scale * LOG2E), max_square = (float)(p.max_step * p.max_step);

  float *o, *peak, *total, *s, *mask;
  Tokens tokens;
  Shapes shapes;
  Scratch scratch;
  const bool has_memory = scratch.allocate([&](Scratch& scratch) {
    products.lay(scratch, FORWARD_QUERIES);
    o = scratch.take(FORWARD_QUERIES * dp), peak = scratch.take(FORWARD_QUERIES), total = scratch.take(FORWARD_QUERIES);
    s = scratch.take(ROWS * lds), mask = scratch.take(lds);
    take_tokens(scratch, padded + FORWARD_QUERIES, &tokens);
    take_shapes(scratch, p, GROUP, keys, &shapes);
  });
  if (!has_memory) return task.fail();
  NoSubnormals no_subnormals;

  Items item(task);
  while (item.take()) {
    const Sequence at = item.at;
    const int64_t part = item.part, sequence = item.sequence;
    if (item.has_new_image) read_positions(p, at, padded + FORWARD_QUERIES, tokens);
    if (item.has_new_sequence) {
      products.pack_keys(features(p, p.k, p.k_strides, at), features(p, p.v, p.v_strides, at), L);
      read_tokens(p, at, padded, tokens);
    }
    const int64_t stop = least(L, (part + 1) * queries);
    for (int64_t first = part * queries; first < stop; first += FORWARD_QUERIES) {
      const int64_t count = least(FORWARD_QUERIES, stop - first), rows = up(count, ROWS);
      products.pack_queries(features(p, p.q, p.q_strides, at), first, count, rows, scale);
      for (int64_t j = 0; j < padded; j += keys) {
        const int64_t n = least(keys, padded - j);
        for (int64_t i = 0; i < rows; i += ROWS) {
          const int64_t m = least(ROWS, up(count - i, GROUP));  // the last tile may have fewer
          Start start = {tokens.bias + j, 0};
          if (has_pair_mask(p) && !Arithmetic::SCALES_LATER) {
            for (int64_t r = 0; r < m; r++) read_mask(p, at, least(first + i + r, L - 1), j, n, s + r * lds);
            start = {s, lds};
          }
          products.scores(i, m, j, n, start, s, lds);
          for (int64_t r = 0; r < m && Arithmetic::SCALES_LATER; r++) {
            if (has_pair_mask(p)) read_mask(p, at, least(first + i + r, L - 1), j, n, mask);
            scale_and_mask(s + r * lds, n, scale, has_pair_mask(p) ? mask : tokens.bias + j);
          }
          float peaks[ROWS];
          for (int64_t r = 0; r < m; r += GROUP) {
            Row group[GROUP];
            for (int64_t g = 0; g < GROUP; g++) {
              group[g] = row_of(p, at, tokens, least(first + i + r + g, L - 1));
              if (F == GAUSSIAN)
                fill_shapes(p, group[g], tokens, j, n, max_square, shapes, shapes.data + g * shapes.stride);
            }
            add_decay<F>(s + r * lds, lds, group, j, n, tokens, shapes, peaks + r);
          }
          const int64_t ldp = products.row_of_weights(lds);
          typename Arithmetic::Weight* weights = products.weights(s, lds);
          for (int64_t r = 0; r < m; r++) {
            const float old = j ? peak[i + r] : NOTHING, now = peaks[r] > old ? peaks[r] : old;
            const float mine = exponentiate<Arithmetic>(s + r * lds, n, now, weights + r * ldp);
            const float shrink = j ? exp2_of(old - now) : 0;
            total[i + r] = j ? total[i + r] * shrink + mine : mine;
            peak[i + r] = now;
            if (j && now != old)
              for (int64_t x = 0; x < dp; x += W) store(o + (i + r) * dp + x, load(o + (i + r) * dp + x) * shrink);
          }
          products.mix(weights, ldp, m, j, n, o + i * dp);
        }
      }
      float *peaks = p.rows + sequence * L + first, *sums = peaks + num_sequences * L;
      for (int64_t i = 0; i < count; i++) {
        // A query that may attend to nothing: O = 0 by its factor, and backward 2^(S - peak) = 0.
        // Half of it: a score of 1e31 and more moves what a mask put at NOTHING.
        const bool is_empty = peak[i] <= NOTHING / 2;
        peaks[i] = is_empty ? -NOTHING : peak[i];
        sums[i] = is_empty ? 0 : __builtin_log2f(total[i]);
        total[i] = is_empty ? 0 : 1 / total[i];
      }
      unpack(o, dp, count, p.dim, total, 1, features(p, p.out, p.out_strides, at), first);
    }
  }
}

}  // namespace
