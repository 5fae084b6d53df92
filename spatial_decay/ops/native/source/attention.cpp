// Attention with spatial decay on CPUs, forward and backward: softmax(scale * Q K^T + M) V (SDT Eq. 10).
//
// Nothing of PyTorch's headers, of a C++ library or of threads is used: pointers and strides come in, and a function that
// runs a loop in parallel, libtorch's torch_parallel_for. One source for all processors; build.py compiles it once for
// each instruction set, which VARIANT names. The way through the files: vectors.h, products.h (matrix products in the
// cache), problem.h (what comes in), decays.h (the formulas), forward.h and backward.h (the loops, with the equations).
#include "backward.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#define JOIN(a, b) a##b
#define NAME_OF(variant) JOIN(spatial_decay_attention_, variant)

namespace {

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

enum Result : int64_t { DONE, NO_MEMORY, NO_THREADS };

// Into how many parts a sequence is cut: enough that no thread waits long for the last one.
int64_t parts_of_queries(const Problem& p, int64_t num_sequences) {
  const int64_t wanted = 4 * p.threads;
  return num_sequences >= wanted ? 1 : least((wanted + num_sequences - 1) / num_sequences, up(p.length, 96) / 96);
}

// Few here: each part reads all queries anew, and has a dQ of its own.
int64_t parts_of_keys(const Problem& p, int64_t num_sequences) {
  if (num_sequences < p.threads) {
    const int64_t most = p.length < 128 ? 1 : p.length / 64;
    return least((p.threads + num_sequences - 1) / num_sequences, most);
  }
  const bool is_uneven = num_sequences % p.threads && num_sequences < 4 * p.threads;
  return is_uneven && p.length >= 512 ? least(4, p.length / 256) : 1;
}

int64_t run_forward(const Problem& p, ParallelFor parallel, int64_t num_sequences) {
  static const Body in_floats[] = {forward<NONE, Floats>, forward<MANHATTAN, Floats>, forward<PATH, Floats>,
                                   forward<CAUSAL_PATH, Floats>, forward<GAUSSIAN, Floats>, forward<EUCLIDEAN, Floats>,
                                   forward<SQUARED, Floats>};
  const Body* bodies = in_floats;
#if defined(__AMX_BF16__)
  static const Body by_tiles[] = {forward<NONE, Tiles>, forward<MANHATTAN, Tiles>, forward<PATH, Tiles>,
                                  forward<CAUSAL_PATH, Tiles>, forward<GAUSSIAN, Tiles>, forward<EUCLIDEAN, Tiles>,
                                  forward<SQUARED, Tiles>};
  if (p.dtype == BFLOAT16) bodies = by_tiles;
#endif
  Task task = {p, parts_of_queries(p, num_sequences)};
  const int64_t threads = least(p.threads, num_sequences * task.parts);
  if (parallel(0, threads, 1, bodies[p.formula], &task)) return NO_THREADS;
  return task.error ? NO_MEMORY : DONE;
}

int64_t run_backward(const Problem& p, ParallelFor parallel, int64_t num_sequences) {
  static const Body bodies[] = {backward<NONE>, backward<MANHATTAN>, backward<PATH>, backward<CAUSAL_PATH>,
                                backward<GAUSSIAN>,      backward<EUCLIDEAN>, backward<SQUARED>};
  Task task = {p, parts_of_keys(p, num_sequences)};
  const int64_t tokens = num_sequences * task.parts * p.length, num_numbers = p.formula == GAUSSIAN ? 3 : 1;
  if (task.parts > 1) {
    task.dq_parts = (float*)malloc(tokens * (p.dim + num_numbers) * 4);
    if (!task.dq_parts) return NO_MEMORY;
    task.dnumber_parts = task.dq_parts + tokens * p.dim;
  }
  const int64_t threads = least(p.threads, num_sequences * task.parts);
  int64_t result = parallel(0, threads, 1, bodies[p.formula], &task) ? NO_THREADS : task.error ? NO_MEMORY : DONE;
  if (result == DONE && task.parts > 1 && parallel(0, num_sequences, 1, gather, &task)) result = NO_THREADS;
  free(task.dq_parts);
  return result;
}

}  // namespace

EXPORT int64_t NAME_OF(VARIANT)(const Problem* p, ParallelFor parallel, int64_t is_backward) {
  const int64_t num_sequences = p->batch * p->lines * p->heads;
  if (num_sequences * p->length == 0) return DONE;
  return is_backward ? run_backward(*p, parallel, num_sequences) : run_forward(*p, parallel, num_sequences);
}
