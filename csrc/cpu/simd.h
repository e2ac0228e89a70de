// Plain loops that the compiler vectorises: one clone per instruction set.
//
// A function marked MEGAMM_CLONES is compiled for AVX-512, AVX2 and the baseline; the loader selects the best one that
// the processor supports. Functions it calls must be MEGAMM_INLINE, or they would be compiled for the baseline only.
#pragma once

#include "../common.h"
#include "number.h"
// Included after the number types, which it uses.
#include "../dispatch.h"

#include <algorithm>
#include <cmath>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MEGAMM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGAMM_CLONES
#endif

namespace megamm {

constexpr int64_t kLanes = 32;

// Sum of term(i) for i below `count`. A reduction over a whole loop would be vectorised only as wide as the baseline's
// instructions, so neighbouring terms go to separate sums, which are added at the end. `term` may do more than return
// its number; it must be MEGAMM_LAMBDA.
template <class C, class F>
MEGAMM_INLINE C sum_of(int64_t count, const F& term) {
  C sums[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes)
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += term(first + i);
#pragma omp simd
  for (int64_t i = 0; i < count - first; ++i) sums[i] += term(first + i);
#pragma GCC unroll 8
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[half + i];
  return sums[0];
}

// Number of rows that makes a thread's share worth its start (about 32K elements).
inline int64_t grain(int64_t width) { return width > 32768 ? 1 : 32768 / (width > 0 ? width : 1); }

template <class T>
MEGAMM_CLONES void add_blocks(const compute_t<T>* partial, int64_t blocks, int64_t width, T* to) {
  for (int64_t begin = 0; begin < width; begin += 64) {  // 64 columns at a time stay in registers or the L1 cache
    compute_t<T> sums[64] = {};
    const int64_t columns = width - begin < 64 ? width - begin : 64;
    for (int64_t block = 0; block < blocks; ++block)
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sums[i] += partial[block * width + begin + i];
    for (int64_t i = 0; i < columns; ++i) store(to[begin + i], sums[i]);
  }
}

// Adds partial sums [blocks, width] in order, in the dtype of `like` [width].
inline Tensor sum_of_blocks(const Tensor& partial, const Tensor& like) {
  Tensor total = new_empty(like, {partial.size(1)}, like.scalar_type());
  dispatch(like.scalar_type(), "sum_of_blocks", [&](auto zero) {
    using T = decltype(zero);
    add_blocks<T>(data_of<compute_t<T>>(partial), partial.size(0), partial.size(1), mutable_data_of<T>(total));
  });
  return total;
}

}  // namespace megamm
