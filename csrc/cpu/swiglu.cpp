// SwiGLU on a CPU, forward and backward: y = silu(gate) * up, with optional bias, clamp and weight of each row.
//
// gate, up, y [rows, width], each with its own row stride, bias [2 width], weight [rows]; see ../swiglu.h.
#include "exp.h"
#include "simd.h"

// Included after sigmoid, which it uses.
#include "../swiglu.h"

namespace megamm {
namespace {

// Calls f with the presence of bias, limit and weights as constants: branches would prevent vectorisation.
template <class T, class F>
void choose(const SwigluInput<T>& in, const F& f) {
  const auto as_constant = [](bool value, const auto& g) { value ? g(std::true_type{}) : g(std::false_type{}); };
  as_constant(in.bias, [&](auto bias) {
    as_constant(in.clamps, [&](auto clamps) {
      as_constant(in.row_weight || in.float_weight, [&](auto weight) { f(bias, clamps, weight); });
    });
  });
}

template <class T, bool kBias, bool kClamps, bool kWeight>
MEGAMM_CLONES void forward_rows(const SwigluInput<T> in, T* y, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t width = in.width;
  const C limit = in.limit;
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = in.gate + row * in.gate_stride, *up = in.up + row * in.up_stride, *bias = in.bias;
    const C weight = kWeight ? weight_of_row(in, row) : C(1);
    T* out = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      C g = load(gate[i]), u = load(up[i]);
      if constexpr (kBias) g += load(bias[i]), u += load(bias[width + i]);
      const C value = swiglu_value(g, u, limit, kClamps);
      store(out[i], kWeight ? value * weight : value);
    }
  }
}

// Adds to `dbias` [2 width]; of the pointers for the weights' gradients, at most the one of their dtype is not null.
template <class T, bool kBias, bool kClamps, bool kWeight>
MEGAMM_CLONES void backward_rows(const SwigluInput<T> in, const SwigluOutput<T> to, compute_t<T>* dbias, T* dweight,
                                 float* dweight_float, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t width = in.width;
  const C limit = in.limit;
  for (int64_t row = begin; row < end; ++row) {
    const C weight = kWeight ? weight_of_row(in, row) : C(1);
    const T *gate = in.gate + row * in.gate_stride, *up = in.up + row * in.up_stride, *bias = in.bias;
    const T* dy = to.dy + row * to.dy_stride;
    T *dgate = to.dgate + row * to.stride, *dup = to.dup + row * to.stride;
    const auto column = [=](int64_t i) MEGAMM_LAMBDA {
      C g = load(gate[i]), u = load(up[i]);
      if constexpr (kBias) g += load(bias[i]), u += load(bias[width + i]);
      const SwigluGradient<C> d = swiglu_gradient(g, u, load(dy[i]) * weight, limit, kClamps);
      store(dgate[i], d.gate);
      store(dup[i], d.up);
      if constexpr (kBias) dbias[i] += d.gate, dbias[width + i] += d.up;
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

Tensor swiglu(const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  const SwigluTensors tensors = swiglu_tensors(gate, up, bias, row_weight, limit, "swiglu");
  Tensor y = new_empty(gate, tensors.value_sizes(), gate.scalar_type());
  dispatch(gate.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    const SwigluInput<T> in = tensors.input<T>();
    choose(in, [&](auto bias, auto clamps, auto weight) {
      torch::stable::parallel_for(0, in.rows, grain(in.width), [&](int64_t begin, int64_t end) {
        forward_rows<T, bias, clamps, weight>(in, mutable_data_of<T>(y), begin, end);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(
    const Tensor& dy_any, const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  const SwigluTensors tensors = swiglu_tensors(gate, up, bias, row_weight, limit, "swiglu_backward");
  const Tensor dy = swiglu_rows_of(dy_any, tensors);
  SwigluGradients gradients(tensors);
  const int64_t rows = tensors.rows, width = tensors.width;
  // Blocks depend only on the shape: dbias is bit-identical for any number of threads.
  const int64_t per_block = std::max<int64_t>(grain(width), bias ? (rows + 63) / 64 : 0);
  const int64_t blocks = (rows + per_block - 1) / per_block;
  const std::vector<int64_t> partial_sizes{bias ? blocks : 0, 2 * width};
  Tensor partial = torch::stable::new_zeros(gate, partial_sizes, compute_dtype(gate));
  dispatch(gate.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    const SwigluInput<T> in = tensors.input<T>();
    const SwigluOutput<T> to = gradients.output<T>(dy);
    compute_t<T>* dbias = bias ? mutable_data_of<compute_t<T>>(partial) : nullptr;
    T* dweight = in.row_weight ? mutable_data_of<T>(gradients.row_weight) : nullptr;
    float* dweight_float = in.float_weight ? mutable_data_of<float>(gradients.row_weight) : nullptr;
    choose(in, [&](auto bias, auto clamps, auto weight) {
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          backward_rows<T, bias, clamps, weight>(in, to, dbias + (bias ? block * 2 * width : 0), dweight, dweight_float,
                                                 block * per_block, std::min(rows, (block + 1) * per_block));
      });
    });
  });
  if (bias) gradients.bias = sum_of_blocks(partial, *bias);
  return {gradients.gate, gradients.up, gradients.bias, gradients.row_weight};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megamm
