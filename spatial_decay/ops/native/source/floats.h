// How forward computes its products, for any dtype: in floats. tiles.h has the other way, with the same interface.
//
//     scores    S (m, n) = Q K^T          mix    O (m, d) += P V          for m <= ROWS queries
#pragma once
#include "problem.h"
#include "products.h"

namespace {

class Floats {
 public:
  static constexpr int64_t ROWS = 12;  // queries of a tile: whole tiles of products
  static constexpr int64_t UNIT = W;   // tokens and features are padded to a multiple
  static constexpr int64_t KEYS = 512;  // of a block, at most
  static constexpr bool SCALES_LATER = false;  // queries are scaled as they are packed; masks are where sums begin
  typedef float Weight;

  int64_t d, dp, padded;

  Floats(int64_t d, int64_t length) : d(d), dp(up(d, UNIT)), padded(up(length, UNIT)) {}

  void lay(Scratch& scratch, int64_t queries) {
    q = scratch.take(queries * dp), k = scratch.take(padded * dp), v = scratch.take(padded * dp);
  }

  void pack_keys(Features keys, Features values, int64_t length) {
    pack(keys, 0, length, padded, d, dp, 1.0f, v);
    pack_transposed(v, padded, d, dp, k);
    pack(values, 0, length, padded, d, dp, 1.0f, v);
  }

  void pack_queries(Features x, int64_t first, int64_t n, int64_t rows, float scale) {
    pack(x, first, n, rows, d, dp, scale, q);
  }

  void scores(int64_t i, int64_t m, int64_t j, int64_t n, Start start, float* s, int64_t lds) const {
    product_with_panels(m, n, d, q + i * dp, dp, k + j * d, start, s, lds);
  }

  static Weight* weights(float* s, int64_t) { return s; }  // P takes the place of S
  static int64_t row_of_weights(int64_t lds) { return lds; }
  static void store_weights(Weight* to, vf x) { store(to, x); }
  void mix(const Weight* weights, int64_t ldp, int64_t m, int64_t j, int64_t n, float* o) const {
    product<false>(m, dp, n, weights, ldp, v + j * dp, dp, j ? Start{o, dp} : FROM_ZERO, o, dp);
  }

 private:
  float *q, *k, *v;
};

}  // namespace
