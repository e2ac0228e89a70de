// Softmax cross entropy of rows of logits on a GPU: the statistics of a row's loss, and its gradient in place.
//
// Arguments are described in ../cross_entropy.h. A block processes one row and reads it from memory once in either
// kernel; columns in whole aligned vectors are moved as vectors, the rest one by one.
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
#include "../cross_entropy.h"
#include "common.cuh"

#include <cmath>
#include <limits>

namespace megamm {
namespace {

constexpr int kThreads = 512;

template <class C>
constexpr C kLowest = -std::numeric_limits<C>::infinity();

// Logits, their row stride, the number of columns in vectors, the number of all columns.
template <class T>
struct Rows {
  T* logits;
  int64_t stride, in_vectors, columns;
  const int64_t* target;
  compute_t<T>* statistics;
};

// A maximum m, and the sum of exp(x - m) over the values seen. If all are -inf, nothing may be subtracted.
template <class C>
struct Online {
  C maximum = kLowest<C>, exponentials = 0;

  __device__ __forceinline__ void raise(C to) {
    if (!(to > maximum)) return;
    exponentials *= maximum > kLowest<C> ? std::exp(maximum - to) : C(1);  // 1: keeps a NaN
    maximum = to;
  }
  __device__ __forceinline__ void add(C x) { exponentials += std::exp(x - (maximum > kLowest<C> ? maximum : C(0))); }
};

// Maximum over the threads of a block, on every thread. `scratch` as in sum_in_block.
template <class C>
__device__ __forceinline__ C max_in_block(C value, C* scratch) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const C other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  C largest = kLowest<C>;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) largest = scratch[warp] > largest ? scratch[warp] : largest;
  return largest;
}

template <class T>
__global__ void __launch_bounds__(kThreads) statistics_of_rows(Rows<T> p) {
  using C = compute_t<T>;
  constexpr int kVector = kPerVector<T>;
  __shared__ C scratch[2][kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* x = p.logits + row * p.stride;
  Online<C> own;
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.in_vectors; column += kThreads * kVector) {
    const auto held = *reinterpret_cast<const Vector<T, kVector>*>(x + column);
    C largest = kLowest<C>;  // a NaN is ignored here, but makes the sum NaN
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const C value = load(held.items[i]);
      largest = value > largest ? value : largest;
    }
    own.raise(largest);
#pragma unroll
    for (int i = 0; i < kVector; ++i) own.add(load(held.items[i]));
  }
  for (int64_t column = p.in_vectors + threadIdx.x; column < p.columns; column += kThreads) {
    const C value = load(x[column]);
    own.raise(value);
    own.add(value);
  }
  const C maximum = max_in_block(own.maximum, scratch[0]);
  own.raise(maximum);
  const C exponentials = sum_in_block<kThreads>(own.exponentials, scratch[1]);
  if (threadIdx.x > 0) return;
  const int64_t target = p.target[row];
  C* to = p.statistics + row * 3;
  to[0] = maximum;
  to[1] = exponentials;
  to[2] = target >= 0 && target < p.columns ? load(x[target]) : C(0);
}

// factor * softmax(x), minus factor at the target.
template <class T>
__global__ void __launch_bounds__(kThreads) gradient_of_rows(Rows<T> p, const compute_t<T>* factor) {
  using C = compute_t<T>;
  constexpr int kVector = kPerVector<T>;
  const int64_t row = blockIdx.x, target = p.target[row];
  T* x = p.logits + row * p.stride;
  const C weight = factor[row], maximum = p.statistics[row * 3], scale = weight / p.statistics[row * 3 + 1];
  const bool counts = weight != 0;  // otherwise 0 whatever the logits are: 0 * NaN is NaN
  const auto gradient = [&](T logit, int64_t column) {
    return counts ? std::exp(load(logit) - maximum) * scale - (column == target ? weight : C(0)) : C(0);
  };
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.in_vectors; column += kThreads * kVector) {
    auto* address = reinterpret_cast<Vector<T, kVector>*>(x + column);
    auto held = *address;
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(held.items[i], gradient(held.items[i], column + i));
    *address = held;
  }
  for (int64_t column = p.in_vectors + threadIdx.x; column < p.columns; column += kThreads)
    store(x[column], gradient(x[column], column));
}

template <class T>
Rows<T> rows_at(const Tensor& logits, const Tensor& target, const Tensor& statistics) {
  const int64_t columns = logits.size(1), stride = row_stride(logits);
  const bool aligned = stride % kPerVector<T> == 0 && reinterpret_cast<uintptr_t>(logits.const_data_ptr()) % 16 == 0;
  return {mutable_data_of<T>(logits), stride, aligned ? columns - columns % kPerVector<T> : 0, columns,
          data_of<int64_t>(target), mutable_data_of<compute_t<T>>(statistics)};
}

void cross_entropy_statistics(const Tensor& logits, const Tensor& target, const Tensor& statistics) {
  check_rows(logits, target, statistics, "cross_entropy_statistics");
  DeviceGuard guard(logits.get_device_index());
  dispatch(logits.scalar_type(), "cross_entropy_statistics", [&](auto zero) {
    using T = decltype(zero);
    launch(statistics_of_rows<T>, logits.size(0), kThreads, 0, logits, rows_at<T>(logits, target, statistics));
  });
}

void cross_entropy_gradient(const Tensor& logits, const Tensor& target, const Tensor& statistics, const Tensor& factor) {
  check_gradient(logits, target, statistics, factor);
  DeviceGuard guard(logits.get_device_index());
  dispatch(logits.scalar_type(), "cross_entropy_gradient_", [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    launch(gradient_of_rows<T>, logits.size(0), kThreads, 0, logits, rows_at<T>(logits, target, statistics),
           data_of<C>(factor));
  });
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient));
}

}  // namespace megamm
