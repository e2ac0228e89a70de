// Softmax cross entropy of rows of logits on a CPU: the statistics of a row's loss, and its gradient in place.
//
// Arguments are described in ../cross_entropy.h. Statistics are computed block by block of a row, so that a block is in
// the L1 cache for its second pass and the row is read from memory once.
// Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
#include "../cross_entropy.h"
#include "exp.h"
#include "simd.h"

#include <limits>

namespace megamm {
namespace {

constexpr int64_t kBlock = 2048;

// exp(x) of x <= 0, as for a logit minus the largest; 0 from -88 on. It keeps a NaN.
MEGAMM_INLINE float exp_of(float x) { return exp_above(x < -88.0f ? -88.0f : x); }
MEGAMM_INLINE double exp_of(double x) { return std::exp(x); }

template <class T>
MEGAMM_CLONES void statistics_rows(
    const T* logits, int64_t stride, int64_t columns, const int64_t* target, compute_t<T>* out,
    int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr C kLowest = -std::numeric_limits<C>::infinity();
  for (int64_t row = begin; row < end; ++row) {
    const T* x = logits + row * stride;
    C maximum = kLowest, exponentials = 0;
    for (int64_t first = 0; first < columns; first += kBlock) {
      const T* in = x + first;
      const int64_t count = columns - first < kBlock ? columns - first : kBlock;
      C largest = kLowest;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < count; ++i) {
        const C value = load(in[i]);
        largest = value > largest ? value : largest;  // a NaN is ignored here, but makes the sum NaN
      }
      if (largest > maximum) {
        exponentials *= maximum > kLowest ? exp_of(maximum - largest) : C(1);  // 1: keeps a NaN
        maximum = largest;
      }
      // If all logits are -inf, nothing may be subtracted.
      const C reference = maximum > kLowest ? maximum : C(0);
      exponentials += sum_of<C>(count, [=](int64_t i) MEGAMM_LAMBDA { return exp_of(load(in[i]) - reference); });
    }
    C* to = out + row * 3;
    to[0] = maximum;
    to[1] = exponentials;
    to[2] = target[row] >= 0 && target[row] < columns ? load(x[target[row]]) : C(0);
  }
}

// x = factor * softmax(x), minus factor at the target, if that is in the row.
template <class T>
MEGAMM_CLONES void gradient_rows(
    T* logits, int64_t stride, int64_t columns, const int64_t* target, const compute_t<T>* statistics,
    const compute_t<T>* factor, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    T* x = logits + row * stride;
    const C weight = factor[row];
    if (weight == 0) {  // whatever the logits are: 0 * NaN is NaN
      std::memset(x, 0, columns * sizeof(T));
      continue;
    }
    const C maximum = statistics[row * 3], scale = weight / statistics[row * 3 + 1];
    const bool has_target = target[row] >= 0 && target[row] < columns;
    const C at_target = has_target ? load(x[target[row]]) : C(0);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) store(x[i], exp_of(load(x[i]) - maximum) * scale);
    if (has_target) store(x[target[row]], exp_of(at_target - maximum) * scale - weight);
  }
}

void cross_entropy_statistics(const Tensor& logits, const Tensor& target, const Tensor& statistics) {
  check_rows(logits, target, statistics, "cross_entropy_statistics");
  const int64_t columns = logits.size(1);
  dispatch(logits.scalar_type(), "cross_entropy_statistics", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, logits.size(0), grain(columns), [&](int64_t begin, int64_t end) {
      statistics_rows<T>(data_of<T>(logits), row_stride(logits), columns, data_of<int64_t>(target),
                         mutable_data_of<compute_t<T>>(statistics), begin, end);
    });
  });
}

void cross_entropy_gradient(const Tensor& logits, const Tensor& target, const Tensor& statistics, const Tensor& factor) {
  check_gradient(logits, target, statistics, factor);
  const int64_t columns = logits.size(1);
  dispatch(logits.scalar_type(), "cross_entropy_gradient_", [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    torch::stable::parallel_for(0, logits.size(0), grain(columns), [&](int64_t begin, int64_t end) {
      gradient_rows<T>(mutable_data_of<T>(logits), row_stride(logits), columns, data_of<int64_t>(target),
                       data_of<C>(statistics), data_of<C>(factor), begin, end);
    });
  });
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient));
}

}  // namespace megamm
