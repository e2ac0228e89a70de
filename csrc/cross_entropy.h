// Common parts of cross entropy for CPU and CUDA: the check of arguments.
//
// logits [rows, columns] with one row stride are this rank's columns of a vocabulary that may be split over ranks;
// target [rows] is the label's index among them, or -1 if it is on another rank. statistics [rows, 3], in float32
// (float64 for float64), of each row x: its maximum m, the sum of exp(x - m), x at the target (0 without a
// target). factor [rows] is the factor of each row's loss.
#pragma once

#include "common.h"

namespace megamm {

inline void check_rows(const Tensor& logits, const Tensor& target, const Tensor& statistics, const char* op) {
  const ScalarType computed = compute_dtype(logits);
  STD_TORCH_CHECK(logits.dim() == 2 && row_stride(logits) >= 0, op, ": logits must be rows at one stride");
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && sizes_of(target) == std::vector<int64_t>{rows} &&
                      target.is_contiguous(),
                  op, ": target must be contiguous int64, one a row");
  STD_TORCH_CHECK(statistics.scalar_type() == computed && sizes_of(statistics) == (std::vector<int64_t>{rows, 3}) &&
                      statistics.is_contiguous(),
                  op, ": statistics must be contiguous, three a row, in the dtype that is computed in");
  STD_TORCH_CHECK(target.device() == logits.device() && statistics.device() == logits.device(), op,
                  ": all arguments must be on one device");
}

inline void check_gradient(const Tensor& logits, const Tensor& target, const Tensor& statistics, const Tensor& factor) {
  check_rows(logits, target, statistics, "cross_entropy_gradient_");
  STD_TORCH_CHECK(factor.scalar_type() == statistics.scalar_type() && sizes_of(factor) == sizes_of(target) &&
                      factor.is_contiguous() && factor.device() == logits.device(),
                  "cross_entropy_gradient_: factor must be contiguous, one a row, in the dtype of the statistics");
}

}  // namespace megamm
