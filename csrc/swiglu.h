// Common parts of SwiGLU for CPU and CUDA: the formulas, the operands as kernels read them, the check of arguments.
//
// Included after the device's load, sigmoid and MEGAMM_INLINE, which it uses.
// Source: Shazeer 2020, "GLU Variants Improve Transformer".
#pragma once

#include "common.h"

#include <optional>

namespace megamm {

// Rows of `gate` and `up` with their own strides; for a fused projection they are the two halves of one row.
template <class T>
struct SwigluInput {
  using C = compute_t<T>;
  const T* gate;
  int64_t gate_stride;
  const T* up;
  int64_t up_stride;
  const T* bias;              // [2 width] or null
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
  Tensor gate;
  std::optional<Tensor> up, bias, row_weight;
  std::optional<double> limit;
  int64_t rows, width;

  bool is_weight_float() const { return row_weight && row_weight->scalar_type() != gate.scalar_type(); }

  template <class T>
  SwigluInput<T> input() const {
    using C = compute_t<T>;
    return {data_of<T>(gate),
            row_stride(gate),
            up ? data_of<T>(*up) : data_of<T>(gate) + width,
            row_stride(up ? *up : gate),
            bias ? data_of<T>(*bias) : nullptr,
            row_weight && !is_weight_float() ? data_of<T>(*row_weight) : nullptr,
            is_weight_float() ? data_of<float>(*row_weight) : nullptr,
            rows,
            width,
            C(limit.value_or(0)),
            limit.has_value()};
  }

  std::vector<int64_t> value_sizes() const {
    auto sizes = sizes_of(gate);
    sizes.back() = width;
    return sizes;
  }
};

// Gradients of the operands; those of absent operands have no elements.
struct SwigluGradients {
  Tensor gate, up, bias, row_weight;

  explicit SwigluGradients(const SwigluTensors& of)
      : gate(new_empty(of.gate)), up(like(of.up, of)), bias(like(of.bias, of)), row_weight(like(of.row_weight, of)) {}

  template <class T>
  SwigluOutput<T> output(const Tensor& dy) const {
    const int64_t stride = gate.size(gate.dim() - 1);
    T* dgate = mutable_data_of<T>(gate);
    return {data_of<T>(dy), row_stride(dy), dgate, up.numel() ? mutable_data_of<T>(up) : dgate + stride / 2, stride};
  }

 private:
  static Tensor like(const std::optional<Tensor>& t, const SwigluTensors& of) {
    return t ? new_empty(*t) : new_empty(of.gate, {0}, of.gate.scalar_type());
  }
};

// Checks what kernels assume about each tensor and prepares it for them.
inline SwigluTensors swiglu_tensors(const Tensor& gate, const std::optional<Tensor>& up,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& row_weight,
                                    std::optional<double> limit, const char* op) {
  STD_TORCH_CHECK(gate.dim() > 0, op, ": gate must have an axis");
  const int64_t last = gate.size(gate.dim() - 1);
  STD_TORCH_CHECK(up || last % 2 == 0, op, ": the last axis of a fused projection must be even");
  const int64_t width = up ? last : last / 2;
  if (up) check_same_sizes(*up, gate, op, "up");
  if (bias) {
    check_like(*bias, gate, op, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == 2 * width, op, ": bias must have two elements per column");
  }
  if (row_weight) {
    auto leading = sizes_of(gate);
    leading.pop_back();
    if (row_weight->scalar_type() != ScalarType::Float) check_like(*row_weight, gate, op, "row_weight");
    STD_TORCH_CHECK(row_weight->device() == gate.device() && sizes_of(*row_weight) == leading, op,
                    ": row_weight must have one element per row, on the device of gate");
  }
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : t;
  };
  return {as_rows(gate),          up ? std::optional(as_rows(*up)) : up, contiguous(bias),
          contiguous(row_weight), limit, rows_of(gate), width};
}

// The gradient of y as rows, checked against the operands.
inline Tensor swiglu_rows_of(const Tensor& dy, const SwigluTensors& of) {
  check_like(dy, of.gate, "swiglu_backward", "dy");
  STD_TORCH_CHECK(sizes_of(dy) == of.value_sizes(), "swiglu_backward: dy is not of the sizes of swiglu's result");
  return as_rows(dy);
}

}  // namespace
}  // namespace megamm
