// Vectors of floats, as wide as the instruction set has them, by the vector types of GCC and Clang: W lanes of `vf`.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#define FIRST_OF_BOTH 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_OF_BOTH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define BYTES 32
#define FIRST_OF_BOTH 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_OF_BOTH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define BYTES 16
#define FIRST_OF_BOTH 0, 4, 1, 5
#define LAST_OF_BOTH 2, 6, 3, 7
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

namespace {

constexpr int64_t W = BYTES / 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool HAS_32_REGISTERS = true;
#else
constexpr bool HAS_32_REGISTERS = false;
#endif

typedef float vf __attribute__((vector_size(BYTES)));
typedef int32_t vi __attribute__((vector_size(BYTES)));
typedef float vf_anywhere __attribute__((vector_size(BYTES), aligned(4)));  // not at a multiple of its size
typedef int32_t vi_anywhere __attribute__((vector_size(BYTES), aligned(4)));

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// The score of what a query may not attend to: finite, so that no difference of two is NaN, and 2^NOTHING = 0.
constexpr float NOTHING = -3e38f;

INLINE int64_t up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vf load(const float* p) { return *(const vf_anywhere*)p; }
INLINE vi load(const int32_t* p) { return *(const vi_anywhere*)p; }
INLINE void store(float* p, vf x) { *(vf_anywhere*)p = x; }
// The same number in all lanes: arithmetic of a number and a vector is by lane, and -0 - 0 is -0.
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }
INLINE vf masked(vf x, vi mask) { return (vf)((vi)x & mask); }
INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// b where either is NaN. Named instructions: of `a > b ? a : b` GCC makes a comparison and a choice.
#if defined(__AVX512F__)
INLINE vf maximum(vf a, vf b) { return (vf)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b); }
INLINE vf minimum(vf a, vf b) { return (vf)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b); }
INLINE vf root(vf x) { return (vf)_mm512_maskz_sqrt_ps(-1, (__m512)x); }
#elif defined(__AVX__)
INLINE vf maximum(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf minimum(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
INLINE vf root(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
#elif defined(__SSE__)
INLINE vf maximum(vf a, vf b) { return (vf)_mm_max_ps((__m128)a, (__m128)b); }
INLINE vf minimum(vf a, vf b) { return (vf)_mm_min_ps((__m128)a, (__m128)b); }
INLINE vf root(vf x) { return (vf)_mm_sqrt_ps((__m128)x); }
#else
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
INLINE vf root(vf x) {
  UNROLL for (int64_t i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
#endif

typedef float v4 __attribute__((vector_size(16)));

INLINE float sum(vf x) {
  v4 parts[W / 4];
  memcpy(parts, &x, BYTES);
  v4 y = parts[0];
  UNROLL for (int64_t i = 1; i < W / 4; i++) y += parts[i];
  return (y[0] + y[2]) + (y[1] + y[3]);
}

INLINE float largest(vf x) {
  v4 parts[W / 4];
  memcpy(parts, &x, BYTES);
  v4 y = parts[0];
  UNROLL for (int64_t i = 1; i < W / 4; i++) y = parts[i] > y ? parts[i] : y;
  const float even = y[2] > y[0] ? y[2] : y[0], odd = y[3] > y[1] ? y[3] : y[1];
  return odd > even ? odd : even;
}

// 2^x for x < 128, relative error 3e-7; 0 from -127 down. 2^x = 2^n 2^r with n the nearest whole number: 2^r by a
// polynomial, 1 at r = 0.
INLINE vf exp2v(vf x) {
  x = maximum(splat(-127.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's last bit counts ones
  const vf shifted = x + magic, r = x - (shifted - magic);
  vf p = splat(1.3398874e-3f);
  p = p * r + 9.6184373e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314720e-1f;
  p = p * r + 1.0f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

// While one lives, numbers below 2^-126 count as 0 on this thread: with them an Intel processor takes 100 cycles for a
// product, and weights of far keys are full of them.
class NoSubnormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();

 public:
  NoSubnormals() { _mm_setcsr(before | 0x8040); }  // of results and of operands
  ~NoSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;

 public:
  NoSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | (1 << 24)));
  }
  ~NoSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#else
 public:
  NoSubnormals() {}
#endif
};

INLINE float exp2_of(float x) { return exp2v(splat(x))[0]; }

// W rows of W floats, rows and columns exchanged.
INLINE void transpose(vf* x) {
  vf y[W];
  for (int64_t step = 1; step < W; step *= 2) {
    UNROLL for (int64_t i = 0; i < W / 2; i++) {
      y[2 * i] = INTERLEAVE(x[i], x[i + W / 2], FIRST_OF_BOTH);
      y[2 * i + 1] = INTERLEAVE(x[i], x[i + W / 2], LAST_OF_BOTH);
    }
    UNROLL for (int64_t i = 0; i < W; i++) x[i] = y[i];
  }
}

// Elements of tensors, all computed with as floats. Written without branches, so that compilers make vectors of them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE float read(float x) { return x; }
INLINE double read(double x) { return x; }
INLINE float read(BFloat16 x) { return float_of((uint32_t)x.bits << 16); }
INLINE float read(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
  const float subnormal = (float)(int32_t)size * 0x1p-24f;
  uint32_t bits = (size << 13) + (112u << 23);           // the exponent of 1 is 15 there, 127 here
  bits = size < 0x400 ? bits_of(subnormal) : bits;
  bits = size < 0x7c00 ? bits : bits + (112u << 23);     // infinity and NaN
  return float_of(bits | sign);
}

INLINE void write(float x, float* p) { *p = x; }
INLINE void write(float x, BFloat16* p) {  // to the nearest, to the even one of two
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = (uint16_t)(x != x ? 0x7fc0 : rounded);
}
INLINE void write(float x, Float16* p) {
  const uint32_t bits = bits_of(x), size = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const uint32_t rounded = ((size + 0xfff + ((size >> 13) & 1)) >> 13) - (112u << 10);
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);  // the last bit of 0.5 is 2^-24
  uint32_t half = size < bits_of(0x1p-14f) ? subnormal : rounded;
  half = size < bits_of(65520.0f) ? half : 0x7c00;
  p->bits = (uint16_t)((x != x ? 0x7e00 : half) | sign);
}

}  // namespace
