// Common parts of RMSNorm for CPU and CUDA: the check of arguments, and the shape of statistics.
#pragma once

#include "common.h"

namespace megamm {

inline void check_weight(const Tensor& x, const Tensor& weight, const char* op) {
  check_like(weight, x, op, "weight");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), op,
                  ": weight must have as many elements as the last axis of x");
}

inline std::vector<int64_t> leading_sizes(const Tensor& x) {
  auto sizes = sizes_of(x);
  sizes.pop_back();
  return sizes;
}

inline void check_backward(const Tensor& dy, const std::optional<Tensor>& dx_add, const Tensor& x, const Tensor& weight,
                           const Tensor& rstd) {
  check_weight(x, weight, "rms_norm_backward");
  check_same_sizes(dy, x, "rms_norm_backward", "dy");
  if (dx_add) check_same_sizes(*dx_add, x, "rms_norm_backward", "dx_add");
  STD_TORCH_CHECK(rstd.scalar_type() == compute_dtype(x) && sizes_of(rstd) == leading_sizes(x),
                  "rms_norm_backward: rstd is not the one that rms_norm gave");
}

// rms_norm and add_rms_norm of one device: `run` is its loop over rows. Without `residual`, `sum` is not written.
template <class F>
std::tuple<Tensor, Tensor> norm_with(const F& run, const Tensor& x_any, const Tensor& weight_any, double eps,
                                     bool zero_centered) {
  check_weight(x_any, weight_any, "rms_norm");
  const Tensor x = as_rows(x_any), weight = as_rows(weight_any);
  Tensor y = new_empty(x), rstd = new_empty(x, leading_sizes(x), compute_dtype(x));
  run(x, nullptr, weight, y, nullptr, rstd, eps, zero_centered);
  return {y, rstd};
}

template <class F>
std::tuple<Tensor, Tensor, Tensor> add_norm_with(const F& run, const Tensor& x_any, const Tensor& residual_any,
                                                 const Tensor& weight_any, double eps, bool zero_centered) {
  check_weight(x_any, weight_any, "add_rms_norm");
  check_same_sizes(residual_any, x_any, "add_rms_norm", "residual");
  const Tensor x = as_rows(x_any), residual = as_rows(residual_any), weight = as_rows(weight_any);
  Tensor y = new_empty(x), sum = new_empty(x), rstd = new_empty(x, leading_sizes(x), compute_dtype(x));
  run(x, &residual, weight, y, &sum, rstd, eps, zero_centered);
  return {y, sum, rstd};
}

}  // namespace megamm
