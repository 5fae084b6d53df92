// How forward computes its products for bfloat16 on processors with AMX: by tiles of 16 x 32 bfloat16, summed in float32.
//
// The interface is that of floats.h. P is rounded to bfloat16, as F.scaled_dot_product_attention rounds it.
#pragma once
#include "problem.h"
#include "products.h"

#if defined(__AMX_BF16__)
namespace {

// C (32, n) = A (32, k) B, added to C where `adds`. A: rows of bfloat16. B: panels of 16 columns, `panel` words apart; in
// each a word is two bfloat16, one above the other in B, (k / 2, 16). n is a multiple of 16, k of 32.
INLINE void product_by_tiles(int64_t n, int64_t k, const uint16_t* a, int64_t lda, const uint32_t* b, int64_t panel,
                             bool adds, float* c, int64_t ldc) {
  // Tiles 0 to 3 are sums, two by two; 4 and 5 A, one below the other; 6 and 7 B, side by side.
  const uint16_t* below = a + 16 * lda;
  __asm__ volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  for (int64_t j = 0; j < n; j += 32, b += 2 * panel) {
    const bool has_two = n - j > 16;
    float *top = c + j, *bottom = top + 16 * ldc;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    if (adds) {
      _tile_loadd(0, top, ldc * 4); _tile_loadd(1, bottom, ldc * 4);
      if (has_two) {
        _tile_loadd(2, top + 16, ldc * 4); _tile_loadd(3, bottom + 16, ldc * 4);
      }
    }
    for (int64_t l = 0; l < k; l += 32) {
      _tile_loadd(4, a + l, lda * 2); _tile_loadd(5, below + l, lda * 2); _tile_loadd(6, b + l * 8, 64);
      _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
      if (!has_two) continue;
      _tile_loadd(7, b + panel + l * 8, 64);
      _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, top, ldc * 4); _tile_stored(1, bottom, ldc * 4);
    if (has_two) {
      _tile_stored(2, top + 16, ldc * 4); _tile_stored(3, bottom + 16, ldc * 4);
    }
  }
}

class Tiles {
 public:
  static constexpr int64_t ROWS = 32, UNIT = 32, KEYS = 256;
  static constexpr bool SCALES_LATER = true;  // a scaled query would be rounded once more
  typedef uint16_t Weight;

  int64_t d, dp, padded;

  Tiles(int64_t d, int64_t length) : d(d), dp(up(d, UNIT)), padded(up(length, UNIT)) {
    alignas(64) uint8_t config[64] = {1};  // eight tiles of 16 rows of 64 bytes
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }

  void lay(Scratch& scratch, int64_t queries) {
    q = (uint16_t*)scratch.take(queries * dp / 2);
    k = (uint32_t*)scratch.take(padded * dp / 2), v = (uint32_t*)scratch.take(padded * dp / 2);
    p = (uint16_t*)scratch.take(ROWS * (KEYS + UNIT) / 2);
  }

  void pack_keys(Features keys, Features values, int64_t length) {
    for (int64_t j = 0; j < padded; j += 16)
      for (int64_t l = 0; l < dp; l += 32) {  // 16 keys and 16 words of two features, exchanged
        vf block[16];
        for (int64_t i = 0; i < 16; i++) block[i] = load(keys, j + i, length, l);
        transpose(block);
        for (int64_t i = 0; i < 16; i++) store((float*)k + j * dp / 2 + (l / 2 + i) * 16, block[i]);
      }
    for (int64_t j = 0; j < padded; j += 2)
      for (int64_t l = 0; l < dp; l += 32) {  // words of one feature of two keys
        const vi above = (vi)load(values, j, length, l), below = (vi)load(values, j + 1, length, l);
        // Words of the features 2 i and of 2 i + 1, then in the order of the features.
        const vi even = (above & 0xffff) | (below << 16), odd = ((above >> 16) & 0xffff) | (below & ~0xffff);
        store((float*)v + (l / 16) * 8 * padded + j * 8, (vf)INTERLEAVE(even, odd, FIRST_OF_BOTH));
        store((float*)v + (l / 16 + 1) * 8 * padded + j * 8, (vf)INTERLEAVE(even, odd, LAST_OF_BOTH));
      }
  }

  void pack_queries(Features x, int64_t first, int64_t n, int64_t rows, float) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t l = 0; l < dp; l += 32) store((float*)(q + i * dp + l), load(x, first + i, first + n, l));
  }

  void scores(int64_t i, int64_t, int64_t j, int64_t n, Start, float* s, int64_t lds) const {
    product_by_tiles(n, dp, q + i * dp, dp, k + j * dp / 2, 8 * dp, false, s, lds);
  }

  Weight* weights(float*, int64_t) const { return p; }
  static int64_t row_of_weights(int64_t) { return KEYS + UNIT; }
  static void store_weights(Weight* to, vf x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
  void mix(const Weight* weights, int64_t ldp, int64_t, int64_t j, int64_t n, float* o) const {
    product_by_tiles(dp, n, weights, ldp, v + j * 8, 8 * padded, j > 0, o, dp);
  }

 private:
  uint16_t *q, *p;
  uint32_t *k, *v;

  // 32 features of a token from l on; zeros from d on and for tokens that do not exist.
  vf load(Features x, int64_t token, int64_t length, int64_t l) const {
    const int64_t count = token < length ? least(32, d - l) : 0;
    const __mmask32 mask = count <= 0 ? 0 : count == 32 ? ~0u : (1u << count) - 1;
    return (vf)_mm512_maskz_loadu_epi16(mask, (const uint16_t*)x.data + token * x.stride + l);
  }
};

}  // namespace
#endif
