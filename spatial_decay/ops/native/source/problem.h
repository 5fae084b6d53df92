// What one call is given, as call.py lays it out, and the way from tensors to rows of floats and back.
#pragma once
#include <stdlib.h>

#include "vectors.h"

namespace {

enum Formula : int64_t { NONE, MANHATTAN, PATH, CAUSAL_PATH, GAUSSIAN, EUCLIDEAN, SQUARED };
enum DType : int64_t { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, BOOL };

constexpr bool is_a_path(int64_t formula) { return formula == PATH || formula == CAUSAL_PATH; }

// S sequences of L tokens: the heads of the lines (rows or columns of a grid, or one) of the images.
struct Problem {
  // (image, line, head, token, feature); features lie side by side.
  const void *q, *k, *v;
  void* out;
  const void* grad;
  void *dq, *dk, *dv;
  const float* numbers;    // (number, image and line, head, token): what the decay knows of each token, nats
  float* dnumbers;         // the same, contiguous
  float* rows;             // (2, S, L), contiguous: peak and log2 of the sum of each query's row of scores
  const float* positions;  // (3, L) an image: row, column, and 1 where the token lies somewhere; null: a grid
  const void* mask;        // (image and line, head, query, key), or null
  const float* mask_tops;  // (image and line, head, query): what a row of the mask is lowered by, or null
  int64_t q_strides[4], k_strides[4], v_strides[4], out_strides[4], grad_strides[4], dq_strides[4], dk_strides[4],
      dv_strides[4];  // of image, line, head and token, in elements
  int64_t number_strides[4], position_stride, mask_strides[4], mask_top_strides[3];  // 0 where shared
  int64_t batch, lines, heads, length, dim, prefix, height, width;
  int64_t formula, dtype, mask_dtype, threads;
  double scale, mask_limit, max_step;
};

struct Sequence {
  int64_t image, line, head;
  int64_t group(const Problem& p) const { return image * p.lines + line; }  // what numbers and masks count
};

INLINE Sequence sequence_of(const Problem& p, int64_t index) {
  return {index / p.heads / p.lines, index / p.heads % p.lines, index % p.heads};
}

// The tokens of one sequence in a tensor.
struct Features {
  void* data;
  int64_t stride, dtype;
  int64_t ahead = 0;  // from here to the sequence that comes next, which is fetched into the cache meanwhile
};

INLINE Features features(const Problem& p, const void* x, const int64_t* strides, Sequence s) {
  const int64_t size = p.dtype == FLOAT32 ? 4 : 2;
  const int64_t offset = s.image * strides[0] + s.line * strides[1] + s.head * strides[2];
  int64_t ahead = strides[2];
  if (s.head + 1 == p.heads) ahead += (s.line + 1 < p.lines ? strides[1] : strides[0]) - p.heads * strides[2];
  return {(char*)x + offset * size, strides[3], p.dtype, ahead};
}

template <class T>
void pack_as(const T* __restrict x, int64_t stride, int64_t n, int64_t d, int64_t dp, float factor, int64_t ahead,
             float* __restrict out) {
  const int64_t whole = d / W * W;
  for (int64_t i = 0; i < n; i++, x += stride, out += dp) {
    for (int64_t j = 0; j < whole; j += W) {
      __builtin_prefetch(x + j + ahead);
      UNROLL for (int64_t l = 0; l < W; l++) out[j + l] = read(x[j + l]) * factor;
    }
    for (int64_t j = whole; j < dp; j++) out[j] = j < d ? read(x[j]) * factor : 0;
  }
}

// n tokens from the first on, times factor, as rows of dp floats; zeros from d and from n on, up to `padded` rows.
void pack(Features x, int64_t first, int64_t n, int64_t padded, int64_t d, int64_t dp, float factor, float* out) {
  const int64_t from = first * x.stride;
  if (x.dtype == FLOAT32) pack_as((const float*)x.data + from, x.stride, n, d, dp, factor, x.ahead, out);
  if (x.dtype == BFLOAT16) pack_as((const BFloat16*)x.data + from, x.stride, n, d, dp, factor, x.ahead, out);
  if (x.dtype == FLOAT16) pack_as((const Float16*)x.data + from, x.stride, n, d, dp, factor, x.ahead, out);
  memset(out + n * dp, 0, (padded - n) * dp * 4);
}

template <class T>
void unpack_as(const float* __restrict x, int64_t dp, int64_t n, int64_t d, const float* factors, int64_t step,
               T* __restrict out, int64_t stride) {
  const int64_t whole = d / W * W;
  for (int64_t i = 0; i < n; i++, x += dp, out += stride, factors += step) {
    const float factor = *factors;
    for (int64_t j = 0; j < whole; j += W) UNROLL for (int64_t l = 0; l < W; l++) write(x[j + l] * factor, out + j + l);
    for (int64_t j = whole; j < d; j++) write(x[j] * factor, out + j);
  }
}

// Back again; row i times factors[i * step].
void unpack(const float* x, int64_t dp, int64_t n, int64_t d, const float* factors, int64_t step, Features out,
            int64_t first) {
  const int64_t to = first * out.stride;
  if (out.dtype == FLOAT32) unpack_as(x, dp, n, d, factors, step, (float*)out.data + to, out.stride);
  if (out.dtype == BFLOAT16) unpack_as(x, dp, n, d, factors, step, (BFloat16*)out.data + to, out.stride);
  if (out.dtype == FLOAT16) unpack_as(x, dp, n, d, factors, step, (Float16*)out.data + to, out.stride);
}

// What the passes know of each token, in arrays that end in a few more than L.
struct Tokens {
  float *h, *w;   // position; of a path: the place along it in w
  float* t;       // the first number, base 2 except a path's; 0 for tokens that lie nowhere
  int32_t* lies;  // what is kept of a step's bits: none where the token lies nowhere; of Manhattan's not the sign
  float* bias;    // where the scores of a key begin: the mask over keys, base 2; NOTHING past the last key
};

void read_positions(const Problem& p, Sequence s, int64_t padded, const Tokens& out) {
  const bool is_path = is_a_path(p.formula);
  const int32_t lies = p.formula == MANHATTAN ? 0x7fffffff : -1;
  const float* table = p.positions ? p.positions + s.image * p.position_stride : nullptr;
  int64_t h = 0, w = 0;
  for (int64_t j = 0; j < padded; j++) {
    bool known = j >= p.prefix && j < p.length;
    if (table && known) known = table[2 * p.length + j] != 0;
    out.h[j] = !known ? 0 : table ? table[j] : is_path ? 0 : (float)h;
    out.w[j] = !known ? 0 : table ? table[p.length + j] : is_path ? (float)(j - p.prefix) : (float)w;
    out.lies[j] = known ? lies : 0;
    if (j >= p.prefix && ++w == p.width) w = 0, h++;
  }
}

INLINE const float* numbers(const Problem& p, Sequence s, int64_t number) {
  return p.numbers + number * p.number_strides[0] + s.group(p) * p.number_strides[1] + s.head * p.number_strides[2];
}

template <class T>
void read_mask_as(const T* mask, int64_t stride, int64_t n, double limit, float top, float* out) {
  typedef decltype(read(T())) Wide;  // float; of a double, double
  const Wide most = (Wide)limit, less = (Wide)top;
  if (stride == 1)  // the same, which compilers make vectors of
    for (int64_t x = 0; x < n; x++) out[x] = read(mask[x]) <= most ? NOTHING : (float)(read(mask[x]) - less) * LOG2E;
  else
    for (int64_t x = 0; x < n; x++)
      out[x] = read(mask[x * stride]) <= most ? NOTHING : (float)(read(mask[x * stride]) - less) * LOG2E;
}

// What the mask adds to the scores of query i and keys j .. j + n - 1, base 2; NOTHING past the last key.
void read_mask(const Problem& p, Sequence s, int64_t i, int64_t j, int64_t n, float* out) {
  const int64_t *strides = p.mask_strides, *of_top = p.mask_top_strides, real = least(n, p.length - j);
  const int64_t offset = s.group(p) * strides[0] + s.head * strides[1] + i * strides[2] + j * strides[3];
  const float top = p.mask_tops ? p.mask_tops[s.group(p) * of_top[0] + s.head * of_top[1] + i * of_top[2]] : 0.0f;
  if (p.mask_dtype == FLOAT32) read_mask_as((const float*)p.mask + offset, strides[3], real, p.mask_limit, top, out);
  if (p.mask_dtype == BFLOAT16)
    read_mask_as((const BFloat16*)p.mask + offset, strides[3], real, p.mask_limit, top, out);
  if (p.mask_dtype == FLOAT16) read_mask_as((const Float16*)p.mask + offset, strides[3], real, p.mask_limit, top, out);
  if (p.mask_dtype == FLOAT64) read_mask_as((const double*)p.mask + offset, strides[3], real, p.mask_limit, top, out);
  if (p.mask_dtype == BOOL)
    for (int64_t x = 0; x < real; x++) out[x] = ((const uint8_t*)p.mask)[offset + x * strides[3]] ? 0.0f : NOTHING;
  for (int64_t x = real; x < n; x++) out[x] = NOTHING;
}

INLINE bool has_pair_mask(const Problem& p) { return p.mask && p.mask_strides[2] != 0; }

// What differs from sequence to sequence; the positions stay those of the image.
void read_tokens(const Problem& p, Sequence s, int64_t padded, const Tokens& out) {
  const float* t = numbers(p, s, 0);
  const float factor = is_a_path(p.formula) ? 1 : LOG2E;
  for (int64_t j = 0; j < padded; j++) out.t[j] = out.lies[j] && p.formula ? t[j * p.number_strides[3]] * factor : 0.0f;
  if (p.mask && !has_pair_mask(p))
    read_mask(p, s, 0, 0, padded, out.bias);
  else
    for (int64_t j = 0; j < padded; j++) out.bias[j] = j < p.length ? 0.0f : NOTHING;
}

// Memory of one thread. `lay` takes the pieces, and is called twice: to count, without memory, and then to have them.
struct Scratch {
  void* raw = nullptr;
  char* memory = nullptr;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = memory ? (float*)(memory + used) : nullptr;
    used += up(floats * 4, 64);
    return piece;
  }
  template <class Lay>
  bool allocate(const Lay& lay) {
    lay(*this);
    raw = malloc(used + 64);
    if (!raw) return false;
    memory = (char*)up((int64_t)raw, 64);
    used = 0;
    lay(*this);
    return true;
  }
  ~Scratch() { free(raw); }
};

INLINE void take_tokens(Scratch& scratch, int64_t padded, Tokens* out) {
  *out = {scratch.take(padded), scratch.take(padded), scratch.take(padded), (int32_t*)scratch.take(padded),
          scratch.take(padded)};
}

}  // namespace
