// SwiGLU on a CPU, forward and backward: y = silu(gate) * up, with optional clamp and weight of each row.
//
// gate_up [rows, 2 width], y [rows, width], each with its own row stride, weight [rows]; see ../swiglu.h.
#include "exp.h"
#include "simd.h"

// Included after sigmoid, which it uses.
#include "../swiglu.h"

namespace megamm {
namespace {

// Calls f with the presence of limit and weights as constants: branches would prevent vectorisation.
template <class T, class F>
void choose(const SwigluInput<T>& in, const F& f) {
  const auto as_constant = [](bool value, const auto& g) { value ? g(std::true_type{}) : g(std::false_type{}); };
  as_constant(in.clamps, [&](auto clamps) {
    as_constant(in.row_weight || in.float_weight, [&](auto weight) { f(clamps, weight); });
  });
}

template <class T, bool kClamps, bool kWeight>
MEGAMM_CLONES void forward_rows(const SwigluInput<T> in, T* y, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t width = in.width;
  const C limit = in.limit;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = in.gate + row * in.stride, *up = in.up + row * in.stride;
    const C weight = kWeight ? weight_of_row(in, row) : C(1);
    T* out = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const C value = swiglu_value(load(gate[i]), load(up[i]), limit, kClamps);
      store(out[i], kWeight ? value * weight : value);
    }
  }
}

// Of the pointers for the weights' gradients, at most the one of their dtype is not null.
template <class T, bool kClamps, bool kWeight>
MEGAMM_CLONES void backward_rows(const SwigluInput<T> in, const SwigluOutput<T> to, T* dweight, float* dweight_float,
                                 int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t width = in.width;
  const C limit = in.limit;
  for (int64_t row = begin; row < end; ++row) {
    const C weight = kWeight ? weight_of_row(in, row) : C(1);
    const T *gate = in.gate + row * in.stride, *up = in.up + row * in.stride;
    const T* dy = to.dy + row * to.dy_stride;
    T *dgate = to.dgate + row * to.stride, *dup = to.dup + row * to.stride;
    const auto column = [=](int64_t i) MEGAMM_LAMBDA {
      const SwigluGradient<C> d = swiglu_gradient(load(gate[i]), load(up[i]), load(dy[i]) * weight, limit, kClamps);
      store(dgate[i], d.gate);
      store(dup[i], d.up);
      return load(dy[i]) * d.value;
    };
    if constexpr (kWeight) {
      const C dot = sum_of<C>(width, column);
      dweight ? store(dweight[row], dot) : void(dweight_float[row] = float(dot));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) column(i);
    }
  }
}

Tensor swiglu(const Tensor& gate_up, const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  const SwigluTensors tensors = swiglu_tensors(gate_up, row_weight, limit, "swiglu");
  Tensor y = new_empty(gate_up, tensors.value_sizes(), gate_up.scalar_type());
  dispatch(gate_up.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    const SwigluInput<T> in = tensors.input<T>();
    choose(in, [&](auto clamps, auto weight) {
      torch::stable::parallel_for(0, in.rows, grain(in.width), [&](int64_t begin, int64_t end) {
        forward_rows<T, clamps, weight>(in, mutable_data_of<T>(y), begin, end);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_any, const Tensor& gate_up,
                                           const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  const SwigluTensors tensors = swiglu_tensors(gate_up, row_weight, limit, "swiglu_backward");
  const Tensor dy = swiglu_rows_of(dy_any, tensors);
  SwigluGradients gradients(tensors);
  dispatch(gate_up.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    const SwigluInput<T> in = tensors.input<T>();
    const SwigluOutput<T> to = gradients.output<T>(dy);
    T* dweight = in.row_weight ? mutable_data_of<T>(gradients.row_weight) : nullptr;
    float* dweight_float = in.float_weight ? mutable_data_of<float>(gradients.row_weight) : nullptr;
    choose(in, [&](auto clamps, auto weight) {
      torch::stable::parallel_for(0, in.rows, grain(in.width), [&](int64_t begin, int64_t end) {
        backward_rows<T, clamps, weight>(in, to, dweight, dweight_float, begin, end);
      });
    });
  });
  return {gradients.gate_up, gradients.row_weight};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megamm
