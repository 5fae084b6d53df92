// Products of matrices that lie in the cache: C = S + A B, all rows of floats, by tiles that stay in registers.
//
// S says where the sums begin: a mask, what C has already, or ZEROS. So nothing is added afterwards.
#pragma once
#include "vectors.h"

namespace {

constexpr int64_t NV = HAS_32_REGISTERS ? 4 : 2;  // vectors in a row of a tile
constexpr int64_t PANEL = NV * W;                 // columns of B that lie together, see pack_transposed
constexpr int64_t MOST_COLUMNS = 1024;            // no product is wider
alignas(64) const float ZEROS[MOST_COLUMNS] = {};

struct Start {
  const float* data;
  int64_t stride;  // of rows; 0: all begin with the same
};
constexpr Start FROM_ZERO = {ZEROS, 0};

// A tile of M rows and N vectors. A's rows are a_row apart, its columns a_column.
template <int M, int N>
INLINE void tile(int64_t k, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t ldb, Start start,
                 float* c, int64_t ldc) {
  vf total[M][N];
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int j = 0; j < N; j++) total[i][j] = load(start.data + i * start.stride + j * W);
  for (int64_t l = 0; l < k; l++) {
    vf row[N];
    UNROLL for (int j = 0; j < N; j++) row[j] = load(b + l * ldb + j * W);
    UNROLL for (int i = 0; i < M; i++) {
      const vf x = splat(a[i * a_row + l * a_column]);
      UNROLL for (int j = 0; j < N; j++) total[i][j] += x * row[j];
    }
  }
  UNROLL for (int i = 0; i < M; i++) UNROLL for (int j = 0; j < N; j++) store(c + i * ldc + j * W, total[i][j]);
}

// N vectors of columns: tiles one below the other, as tall as the registers allow, for M * N sums, N of B and 1 of A.
template <int N, bool TRANSPOSED>
void strip(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, Start start, float* c,
           int64_t ldc) {
  const int64_t a_row = TRANSPOSED ? 1 : lda, a_column = TRANSPOSED ? lda : 1;
  constexpr int TALL = !HAS_32_REGISTERS ? 6 : N <= 2 ? 12 : N == 3 ? 8 : 6;
  int64_t i = 0;
#define ROWS_OF_TILES(M)                                                                                      \
  for (; i + (M) <= m; i += (M))                                                                              \
    tile<M, N>(k, a + i * a_row, a_row, a_column, b, ldb, {start.data + i * start.stride, start.stride}, c + i * ldc, ldc);
  ROWS_OF_TILES(TALL)
  ROWS_OF_TILES(6)
  ROWS_OF_TILES(4)
  ROWS_OF_TILES(2)
  ROWS_OF_TILES(1)
#undef ROWS_OF_TILES
}

// C (m, n) = S + A B, or A^T B where TRANSPOSED; n a multiple of W; B's rows are ldb apart.
template <bool TRANSPOSED>
void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, Start start,
             float* c, int64_t ldc) {
  for (; n >= PANEL; n -= PANEL, b += PANEL, c += PANEL, start.data += PANEL)
    strip<NV, TRANSPOSED>(m, k, a, lda, b, ldb, start, c, ldc);
  if (NV > 3 && n == 3 * W) strip<3, TRANSPOSED>(m, k, a, lda, b, ldb, start, c, ldc);
  if (NV > 2 && n == 2 * W) strip<2, TRANSPOSED>(m, k, a, lda, b, ldb, start, c, ldc);
  if (n == W) strip<1, TRANSPOSED>(m, k, a, lda, b, ldb, start, c, ldc);
}

// C (m, n) = S + A (m, k) B, with B as pack_transposed leaves it.
void product_with_panels(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, Start start,
                         float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t width = least(PANEL, n - j);
    product<false>(m, width, k, a, lda, b + j * k, width, {start.data + j, start.stride}, c + j, ldc);
  }
}

// Rows (n, dp) of floats, n a multiple of W, as columns: panels (d, PANEL) one after the other, the last one narrower.
void pack_transposed(const float* x, int64_t n, int64_t d, int64_t dp, float* out) {
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t width = least(PANEL, n - j);
    for (int64_t v = 0; v < width; v += W) {
      for (int64_t l = 0; l < dp; l += W) {
        vf block[W];
        UNROLL for (int64_t i = 0; i < W; i++) block[i] = load(x + (j + v + i) * dp + l);
        transpose(block);
        UNROLL for (int64_t i = 0; i < W; i++) if (l + i < d) store(out + j * d + (l + i) * width + v, block[i]);
      }
    }
  }
}

}  // namespace
