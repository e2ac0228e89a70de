// Common parts of all ops: registration, the row view of a tensor, argument checks.
//
// Only the stable ABI of torch is used (torch/csrc/stable), so that one build serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>
#include <vector>

// The library's name in torch.ops, and the dispatch key of cuda/. Tests build the sources of cuda/ a second time, under
// other names, to run them on a CPU.
#ifndef MEGAMM_LIBRARY
#define MEGAMM_LIBRARY megamm
#endif
#ifndef MEGAMM_CUDA_KEY
#define MEGAMM_CUDA_KEY CUDA
#endif
// One macro level more than torch's own, so that the names above are replaced before they are quoted.
#define MEGAMM_SCHEMAS(library, m) STABLE_TORCH_LIBRARY(library, m)
#define MEGAMM_KERNELS(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace megamm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The type in which numbers of type T are computed.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType compute_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// Contiguous and uninitialised, on the device of `like`.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor new_empty(const Tensor& like) {
  return new_empty(like, sizes_of(like), like.scalar_type());
}

// Product of all sizes but the last.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// Elements from one row (all but the last axis) to the next, or -1 if this is not a single number.
inline int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t stride = -1, reach = 0;  // `reach`: the stride required of the next axis to the left
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (stride < 0) {
      stride = t.stride(i);
    } else if (t.stride(i) != reach) {
      return -1;
    }
    reach = t.stride(i) * t.size(i);
  }
  return stride < 0 ? t.size(last) : stride;
}

// The tensor itself if its rows have one stride, otherwise a contiguous copy.
inline Tensor as_rows(const Tensor& t) {
  return row_stride(t) < 0 ? torch::stable::contiguous(t) : t;
}

// Kernels read through raw pointers: everything they assume about a second tensor is checked here. megamm/ops checks
// the same earlier, with messages for users.
inline void check_like(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " has another dtype than the first argument");
  STD_TORCH_CHECK(t.device() == x.device(), op, ": ", name, " is on another device than the first argument");
}

inline void check_same_sizes(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  check_like(t, x, op, name);
  STD_TORCH_CHECK(sizes_of(t) == sizes_of(x), op, ": ", name, " has other sizes than the first argument");
}

}  // namespace megamm
