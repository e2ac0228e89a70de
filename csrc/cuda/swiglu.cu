// SwiGLU on a GPU, forward and backward: y = silu(gate) * up, with optional clamp and weight of each row.
//
// gate_up [rows, 2 width], y [rows, width], each with its own row stride, weight [rows]; see ../swiglu.h. If nothing is
// summed, a thread takes kHeld vectors, a block's width apart in the order of memory and across the ends of rows: any
// shape fills the device. If weights need sums, groups of threads process `lanes` vectors of a row each. A weight's
// gradient is summed over a group; partial sums are added in order.
#include "common.cuh"

namespace megamm {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

}  // namespace megamm

// Included after sigmoid, which it uses.
#include "../swiglu.h"

namespace megamm {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;      // vectors of gate and up that a thread has in flight
constexpr int kHeldRows = 2;  // the same when sums are computed too

// Position of a thread's next vector. One division finds the first; the next are a fixed number of vectors later.
struct Position {
  int64_t row, vector;

  __device__ __forceinline__ Position(int64_t index, int64_t per_row) : row(index / per_row), vector(index % per_row) {}

  __device__ __forceinline__ void advance(int64_t rows, int64_t vectors, int64_t per_row) {
    row += rows;
    vector += vectors;
    if (vector < per_row) return;
    vector -= per_row;
    ++row;
  }
};

// Vectors per row, and a block's width in whole rows and vectors.
struct Steps {
  int64_t per_row, rows, vectors;
};

// gate and up of one vector.
template <class T, int kVector>
struct Pair {
  Vector<T, kVector> gate, up;

  __device__ __forceinline__ void read(const SwigluInput<T>& in, int64_t row, int64_t column) {
    gate = *reinterpret_cast<const Vector<T, kVector>*>(in.gate + row * in.stride + column);
    up = *reinterpret_cast<const Vector<T, kVector>*>(in.up + row * in.stride + column);
  }
};

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) forward(SwigluInput<T> in, T* y, Steps steps) {
  using C = compute_t<T>;
  const Position first(int64_t(blockIdx.x) * kThreads * kHeld + threadIdx.x, steps.per_row);
  Pair<T, kVector> held[kHeld];
  Position at = first;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at.row < in.rows) held[k].read(in, at.row, at.vector * kVector);
    at.advance(steps.rows, steps.vectors, steps.per_row);
  }
  at = first;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at.row >= in.rows) return;
    const int64_t column = at.vector * kVector;
    const C weight = weight_of_row(in, at.row);
    Vector<T, kVector> out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const C value = swiglu_value(load(held[k].gate.items[i]), load(held[k].up.items[i]), in.limit, in.clamps);
      store(out.items[i], value * weight);
    }
    *reinterpret_cast<Vector<T, kVector>*>(y + at.row * in.width + column) = out;
    at.advance(steps.rows, steps.vectors, steps.per_row);
  }
}

// Writes the gradients of one vector; calls sum(gradient, dy) for each column.
template <class T, int kVector, class F>
__device__ __forceinline__ void write_gradients(const SwigluInput<T>& in, const SwigluOutput<T>& to, int64_t row,
                                                int64_t column, const Pair<T, kVector>& pair,
                                                const Vector<T, kVector>& dy, const F& sum) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  const C weight = weight_of_row(in, row);
  V dgate, dup;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const C gradient = load(dy.items[i]);
    const SwigluGradient<C> d = swiglu_gradient(load(pair.gate.items[i]), load(pair.up.items[i]), gradient * weight,
                                                in.limit, in.clamps);
    store(dgate.items[i], d.gate);
    store(dup.items[i], d.up);
    sum(d, gradient);
  }
  *reinterpret_cast<V*>(to.dgate + row * to.stride + column) = dgate;
  *reinterpret_cast<V*>(to.dup + row * to.stride + column) = dup;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) backward(SwigluInput<T> in, SwigluOutput<T> to, Steps steps) {
  using V = Vector<T, kVector>;
  const Position first(int64_t(blockIdx.x) * kThreads * kHeld + threadIdx.x, steps.per_row);
  Pair<T, kVector> held[kHeld];
  V dy[kHeld];
  Position at = first;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at.row < in.rows) {
      held[k].read(in, at.row, at.vector * kVector);
      dy[k] = *reinterpret_cast<const V*>(to.dy + at.row * to.dy_stride + at.vector * kVector);
    }
    at.advance(steps.rows, steps.vectors, steps.per_row);
  }
  at = first;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at.row >= in.rows) return;
    write_gradients(in, to, at.row, at.vector * kVector, held[k], dy[k], [](auto...) {});
    at.advance(steps.rows, steps.vectors, steps.per_row);
  }
}

// The weights' gradients, [column blocks, rows], that blocks pass to add_partial.
template <class C>
struct Sums {
  C* weight;
  int lanes;  // threads of a group, a power of two, at most a warp
  int64_t column_blocks;
};

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) backward_sums(SwigluInput<T> in, SwigluOutput<T> to,
                                                          Sums<compute_t<T>> sums) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  const int lanes = sums.lanes, lane = threadIdx.x % lanes, groups = kThreads / lanes;
  const int64_t column_block = blockIdx.x % sums.column_blocks;
  const int64_t first = blockIdx.x / sums.column_blocks * groups * kHeldRows;
  const int64_t column = (column_block * lanes + lane) * kVector;
  Pair<T, kVector> held[kHeldRows];
  V dy[kHeldRows];
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    const int64_t row = first + k * groups + threadIdx.x / lanes;
    if (row >= in.rows || column >= in.width) continue;
    held[k].read(in, row, column);
    dy[k] = *reinterpret_cast<const V*>(to.dy + row * to.dy_stride + column);
  }
#pragma unroll
  for (int k = 0; k < kHeldRows; ++k) {
    const int64_t row = first + k * groups + threadIdx.x / lanes;
    C dot = 0;
    if (row < in.rows && column < in.width)
      write_gradients(in, to, row, column, held[k], dy[k],
                      [&](const SwigluGradient<C>& d, C gradient) { dot += gradient * d.value; });
    for (int offset = lanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    if (row < in.rows && lane == 0) sums.weight[column_block * in.rows + row] = dot;
  }
}

// Calls run with the number of elements per vector as a constant: 1 if a row does not allow more.
template <class T, class F>
void choose_vector(const SwigluTensors& tensors, const Tensor* dy, const F& run) {
  const bool aligned =
      tensors.width % kPerVector<T> == 0 && is_vectorisable(tensors.gate_up) && (!dy || is_vectorisable(*dy));
  aligned ? run(std::integral_constant<int, kPerVector<T>>{}) : run(std::integral_constant<int, 1>{});
}

// Calls run with the steps and blocks that cover all vectors.
template <class F>
void cover(const SwigluTensors& tensors, int per_vector, const F& run) {
  const int64_t per_row = tensors.width / per_vector;
  if (per_row == 0) return;
  const int64_t per_block = int64_t(kThreads) * kHeld;
  run(Steps{per_row, kThreads / per_row, kThreads % per_row}, (tensors.rows * per_row + per_block - 1) / per_block);
}

Tensor swiglu(const Tensor& gate_up, const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  DeviceGuard guard(gate_up.get_device_index());
  const SwigluTensors tensors = swiglu_tensors(gate_up, row_weight, limit, "swiglu");
  Tensor y = new_empty(gate_up, tensors.value_sizes(), gate_up.scalar_type());
  dispatch(gate_up.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    choose_vector<T>(tensors, nullptr, [&](auto vector) {
      cover(tensors, vector, [&](const Steps& steps, int64_t blocks) {
        launch(forward<T, vector>, blocks, kThreads, 0, gate_up, tensors.input<T>(), mutable_data_of<T>(y), steps);
      });
    });
  });
  return y;
}

// The backward pass with the weights' gradients, in gradients.row_weight.
template <class T, int kVector>
void run_backward_sums(const SwigluTensors& tensors, const SwigluGradients& gradients, const Tensor& dy) {
  using C = compute_t<T>;
  const int64_t per_row = tensors.width / kVector, rows = tensors.rows;
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 >= per_row) lanes /= 2;
  const int64_t column_blocks = (per_row + lanes - 1) / lanes, block_rows = kThreads / lanes * kHeldRows;
  Tensor partial = new_empty(dy, {column_blocks, rows}, compute_dtype(dy));
  const Sums<C> sums{mutable_data_of<C>(partial), lanes, column_blocks};
  launch(backward_sums<T, kVector>, column_blocks * ((rows + block_rows - 1) / block_rows), kThreads, 0, dy,
         tensors.input<T>(), gradients.output<T>(dy), sums);
  const auto add = [&]<class To>(To) {
    launch(add_partial<C, To>, (rows + kWarp - 1) / kWarp, 256, 0, dy, data_of<C>(partial), column_blocks, rows,
           mutable_data_of<To>(gradients.row_weight));
  };
  tensors.is_weight_float() ? add(0.0f) : add(T{});
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy_any, const Tensor& gate_up,
                                           const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  DeviceGuard guard(gate_up.get_device_index());
  const SwigluTensors tensors = swiglu_tensors(gate_up, row_weight, limit, "swiglu_backward");
  const Tensor dy = swiglu_rows_of(dy_any, tensors);
  SwigluGradients gradients(tensors);
  dispatch(gate_up.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    choose_vector<T>(tensors, &dy, [&](auto vector) {
      if (row_weight) return run_backward_sums<T, vector>(tensors, gradients, dy);
      cover(tensors, vector, [&](const Steps& steps, int64_t blocks) {
        launch(backward<T, vector>, blocks, kThreads, 0, gate_up, tensors.input<T>(), gradients.output<T>(dy), steps);
      });
    });
  });
  return {gradients.gate_up, gradients.row_weight};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megamm
