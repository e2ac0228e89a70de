// Common parts of SwiGLU for CPU and CUDA: the formulas, the operands as kernels read them, the check of arguments.
//
// Included after the device's load, sigmoid and MEGAMM_INLINE, which it uses.
// Source: Shazeer 2020, "GLU Variants Improve Transformer".
#pragma once

#include "common.h"

#include <optional>

namespace megamm {

// Rows of the fused projection: `gate` and `up` are the two halves of one row.
template <class T>
struct SwigluInput {
  using C = compute_t<T>;
  const T* gate;
  const T* up;
  int64_t stride;
  const T* row_weight;        // [rows], or null
  const float* float_weight;  // [rows] in float32, or null; never both
  int64_t rows;
  int64_t width;
  C limit;
  bool clamps;
};

template <class T>
MEGAMM_INLINE compute_t<T> weight_of_row(const SwigluInput<T>& in, int64_t row) {
  if (in.row_weight) return load(in.row_weight[row]);
  return in.float_weight ? compute_t<T>(in.float_weight[row]) : compute_t<T>(1);
}

// Limits gate to at most `limit`, up to between -limit and limit; keeps a NaN.
template <class C>
MEGAMM_INLINE void clamp(C& gate, C& up, C limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
}

template <class C>
MEGAMM_INLINE C swiglu_value(C gate, C up, C limit, bool clamps) {
  if (clamps) clamp(gate, up, limit);
  return gate * sigmoid(gate) * up;
}

template <class C>
struct SwigluGradient {
  C gate, up;
  C value;  // the value of the function
};

// Gradients of gate and up if that of the value is `dy`. They are 0 beyond a limit and, as in torch, for a NaN that was
// to be clamped.
template <class C>
MEGAMM_INLINE SwigluGradient<C> swiglu_gradient(C gate, C up, C dy, C limit, bool clamps) {
  // Without branches, so that it can be vectorised.
  const bool gate_passes = (!clamps) | (gate <= limit);
  const bool up_passes = (!clamps) | ((up <= limit) & (up >= -limit));
  if (clamps) clamp(gate, up, limit);
  const C open = sigmoid(gate);
  const C silu = gate * open;
  const C slope = open * (C(1) + gate * (C(1) - open));
  return {gate_passes ? dy * up * slope : C(0), up_passes ? dy * silu : C(0), silu * up};
}

// The gradient of y, rows with one stride, and the outputs for those of gate and up.
template <class T>
struct SwigluOutput {
  const T* dy;
  int64_t dy_stride;
  T* dgate;
  T* dup;
  int64_t stride;  // of dgate and dup
};

namespace {  // torch's headers hide Tensor: types that hold one must not be visible outside a file either

// The operands as tensors: rows with one stride, the small ones contiguous.
struct SwigluTensors {
  Tensor gate_up;
  std::optional<Tensor> row_weight;
  std::optional<double> limit;
  int64_t rows, width;

  bool is_weight_float() const { return row_weight && row_weight->scalar_type() != gate_up.scalar_type(); }

  template <class T>
  SwigluInput<T> input() const {
    using C = compute_t<T>;
    return {data_of<T>(gate_up),
            data_of<T>(gate_up) + width,
            row_stride(gate_up),
            row_weight && !is_weight_float() ? data_of<T>(*row_weight) : nullptr,
            is_weight_float() ? data_of<float>(*row_weight) : nullptr,
            rows,
            width,
            C(limit.value_or(0)),
            limit.has_value()};
  }

  std::vector<int64_t> value_sizes() const {
    auto sizes = sizes_of(gate_up);
    sizes.back() = width;
    return sizes;
  }
};

// Gradients of the operands; that of an absent row_weight has no elements.
struct SwigluGradients {
  Tensor gate_up, row_weight;

  explicit SwigluGradients(const SwigluTensors& of)
      : gate_up(new_empty(of.gate_up)),
        row_weight(of.row_weight ? new_empty(*of.row_weight)
                                 : new_empty(of.gate_up, {0}, of.gate_up.scalar_type())) {}

  template <class T>
  SwigluOutput<T> output(const Tensor& dy) const {
    const int64_t stride = gate_up.size(gate_up.dim() - 1);
    T* dgate = mutable_data_of<T>(gate_up);
    return {data_of<T>(dy), row_stride(dy), dgate, dgate + stride / 2, stride};
  }
};

// Checks what kernels assume about each tensor and prepares it for them.
inline SwigluTensors swiglu_tensors(const Tensor& gate_up, const std::optional<Tensor>& row_weight,
                                    std::optional<double> limit, const char* op) {
  STD_TORCH_CHECK(gate_up.dim() > 0, op, ": gate_up must have an axis");
  const int64_t last = gate_up.size(gate_up.dim() - 1);
  STD_TORCH_CHECK(last % 2 == 0, op, ": the last axis of a fused projection must be even");
  if (row_weight) {
    auto leading = sizes_of(gate_up);
    leading.pop_back();
    if (row_weight->scalar_type() != ScalarType::Float) check_like(*row_weight, gate_up, op, "row_weight");
    STD_TORCH_CHECK(row_weight->device() == gate_up.device() && sizes_of(*row_weight) == leading, op,
                    ": row_weight must have one element per row, on the device of gate_up");
  }
  return {as_rows(gate_up), row_weight ? std::optional(torch::stable::contiguous(*row_weight)) : row_weight, limit,
          rows_of(gate_up), last / 2};
}

// The gradient of y as rows, checked against the operands.
inline Tensor swiglu_rows_of(const Tensor& dy, const SwigluTensors& of) {
  check_like(dy, of.gate_up, "swiglu_backward", "dy");
  STD_TORCH_CHECK(sizes_of(dy) == of.value_sizes(), "swiglu_backward: dy is not of the sizes of swiglu's result");
  return as_rows(dy);
}

}  // namespace
}  // namespace megamm
