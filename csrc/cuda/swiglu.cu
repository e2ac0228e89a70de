// SwiGLU on a GPU, forward and backward: y = silu(gate) * up, with optional bias, clamp and weight of each row.
//
// gate, up, y [rows, width], each with its own row stride, bias [2 width], weight [rows]; see ../swiglu.h. If nothing
// is summed, a thread takes kHeld vectors, a block's width apart in the order of memory and across the ends of rows:
// any shape fills the device. If bias or weights need sums, groups of threads process `lanes` vectors of a row each. A
// weight's gradient is summed over a group, the bias's over the rows that a block processes; partial sums are added in
// order.
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

// gate and up of one vector with the bias added.
template <class T, int kVector>
struct Pair {
  using C = compute_t<T>;
  Vector<T, kVector> gate, up;

  __device__ __forceinline__ void read(const SwigluInput<T>& in, int64_t row, int64_t column) {
    gate = *reinterpret_cast<const Vector<T, kVector>*>(in.gate + row * in.gate_stride + column);
    up = *reinterpret_cast<const Vector<T, kVector>*>(in.up + row * in.up_stride + column);
  }

  __device__ __forceinline__ void with_bias(const SwigluInput<T>& in, int64_t column, C* g, C* u) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] = load(gate.items[i]), u[i] = load(up.items[i]);
    if (!in.bias) return;
    const auto of_gate = *reinterpret_cast<const Vector<T, kVector>*>(in.bias + column);
    const auto of_up = *reinterpret_cast<const Vector<T, kVector>*>(in.bias + in.width + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[i] += load(of_gate.items[i]), u[i] += load(of_up.items[i]);
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
    C gate[kVector], up[kVector];
    held[k].with_bias(in, column, gate, up);
    Vector<T, kVector> out;
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      store(out.items[i], swiglu_value(gate[i], up[i], in.limit, in.clamps) * weight);
    *reinterpret_cast<Vector<T, kVector>*>(y + at.row * in.width + column) = out;
    at.advance(steps.rows, steps.vectors, steps.per_row);
  }
}

// Writes the gradients of one vector; calls sum(i, gradient, dy) for each column.
template <class T, int kVector, class F>
__device__ __forceinline__ void write_gradients(const SwigluInput<T>& in, const SwigluOutput<T>& to, int64_t row,
                                                int64_t column, const Pair<T, kVector>& pair,
                                                const Vector<T, kVector>& dy, const F& sum) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  const C weight = weight_of_row(in, row);
  C gate[kVector], up[kVector];
  pair.with_bias(in, column, gate, up);
  V dgate, dup;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const C gradient = load(dy.items[i]);
    const SwigluGradient<C> d = swiglu_gradient(gate[i], up[i], gradient * weight, in.limit, in.clamps);
    store(dgate.items[i], d.gate);
    store(dup.items[i], d.up);
    sum(i, d, gradient);
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

// Sums that a block passes to add_partial; null if they are not needed.
template <class C>
struct Sums {
  C* weight;  // [column blocks, rows]
  C* bias;    // [row parts, 2 width]
  int lanes;  // threads of a group, a power of two, at most a warp
  int64_t column_blocks;
};

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) backward_sums(SwigluInput<T> in, SwigluOutput<T> to,
                                                          Sums<compute_t<T>> sums) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  __shared__ C shared[2 * kVector * kThreads];
  const int lanes = sums.lanes, lane = threadIdx.x % lanes, groups = kThreads / lanes;
  const int64_t column_block = blockIdx.x % sums.column_blocks;
  const int64_t part = blockIdx.x / sums.column_blocks, parts = gridDim.x / sums.column_blocks;
  const int64_t column = (column_block * lanes + lane) * kVector;
  C of_gate[kVector] = {}, of_up[kVector] = {};
  for (int64_t first = part * groups * kHeldRows; first < in.rows; first += parts * groups * kHeldRows) {
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
        write_gradients(in, to, row, column, held[k], dy[k], [&](int i, const SwigluGradient<C>& d, C gradient) {
          dot += gradient * d.value;
          of_gate[i] += d.gate;
          of_up[i] += d.up;
        });
      if (!sums.weight) continue;
      for (int offset = lanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
      if (row < in.rows && lane == 0) sums.weight[column_block * in.rows + row] = dot;
    }
  }
  if (!sums.bias) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    shared[i * kThreads + threadIdx.x] = of_gate[i];
    shared[(kVector + i) * kThreads + threadIdx.x] = of_up[i];
  }
  __syncthreads();
  for (int index = threadIdx.x; index < 2 * kVector * lanes; index += kThreads) {
    const int item = index / lanes, of_lane = index % lanes;
    const int64_t to_column = (column_block * lanes + of_lane) * kVector + item % kVector;
    if (to_column >= in.width) continue;
    C total = 0;
    for (int group = 0; group < groups; ++group) total += shared[item * kThreads + group * lanes + of_lane];
    sums.bias[(part * 2 + item / kVector) * in.width + to_column] = total;
  }
}

// Calls run with the number of elements per vector as a constant: 1 if a row does not allow more.
template <class T, class F>
void choose_vector(const SwigluTensors& tensors, const Tensor* dy, const F& run) {
  const bool aligned = tensors.width % kPerVector<T> == 0 && is_vectorisable(tensors.gate) &&
                       (!tensors.up || is_vectorisable(*tensors.up)) &&
                       (!tensors.bias || is_vectorisable(*tensors.bias)) && (!dy || is_vectorisable(*dy));
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

Tensor swiglu(const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  DeviceGuard guard(gate.get_device_index());
  const SwigluTensors tensors = swiglu_tensors(gate, up, bias, row_weight, limit, "swiglu");
  Tensor y = new_empty(gate, tensors.value_sizes(), gate.scalar_type());
  dispatch(gate.scalar_type(), "swiglu", [&](auto zero) {
    using T = decltype(zero);
    choose_vector<T>(tensors, nullptr, [&](auto vector) {
      cover(tensors, vector, [&](const Steps& steps, int64_t blocks) {
        launch(forward<T, vector>, blocks, kThreads, 0, gate, tensors.input<T>(), mutable_data_of<T>(y), steps);
      });
    });
  });
  return y;
}

// The backward pass with sums over rows or columns, in gradients.bias and gradients.row_weight.
template <class T, int kVector>
void run_backward_sums(const SwigluTensors& tensors, const SwigluGradients& gradients, const Tensor& dy) {
  using C = compute_t<T>;
  const int64_t per_row = tensors.width / kVector, rows = tensors.rows, width = tensors.width;
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 >= per_row) lanes /= 2;
  const int64_t column_blocks = (per_row + lanes - 1) / lanes, block_rows = kThreads / lanes * kHeldRows;
  int64_t parts = (rows + block_rows - 1) / block_rows;
  // The bias's sums cover many rows, so that there are few partial sums.
  if (tensors.bias && column_blocks > 0)
    parts = std::min(parts, std::max<int64_t>(
                                1, resident_blocks(backward_sums<T, kVector>, kThreads, 0, dy) / column_blocks));
  const ScalarType dtype = compute_dtype(dy);
  Tensor of_weight = new_empty(dy, {column_blocks, tensors.row_weight ? rows : 0}, dtype);
  Tensor of_bias = new_empty(dy, {parts, tensors.bias ? 2 * width : 0}, dtype);
  const Sums<C> sums{tensors.row_weight ? mutable_data_of<C>(of_weight) : nullptr,
                     tensors.bias ? mutable_data_of<C>(of_bias) : nullptr, lanes, column_blocks};
  launch(backward_sums<T, kVector>, column_blocks * parts, kThreads, 0, dy, tensors.input<T>(),
         gradients.output<T>(dy), sums);
  const auto add = [&]<class To>(const Tensor& partial, const Tensor& to, To) {
    const int64_t columns = partial.size(1);
    launch(add_partial<C, To>, (columns + kWarp - 1) / kWarp, 256, 0, dy, data_of<C>(partial), partial.size(0), columns,
           mutable_data_of<To>(to));
  };
  add(of_bias, gradients.bias, T{});
  tensors.is_weight_float() ? add(of_weight, gradients.row_weight, 0.0f) : add(of_weight, gradients.row_weight, T{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_backward(
    const Tensor& dy_any, const Tensor& gate, const std::optional<Tensor>& up, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& row_weight, std::optional<double> limit) {
  DeviceGuard guard(gate.get_device_index());
  const SwigluTensors tensors = swiglu_tensors(gate, up, bias, row_weight, limit, "swiglu_backward");
  const Tensor dy = swiglu_rows_of(dy_any, tensors);
  SwigluGradients gradients(tensors);
  dispatch(gate.scalar_type(), "swiglu_backward", [&](auto zero) {
    using T = decltype(zero);
    choose_vector<T>(tensors, &dy, [&](auto vector) {
      if (bias || row_weight) return run_backward_sums<T, vector>(tensors, gradients, dy);
      cover(tensors, vector, [&](const Steps& steps, int64_t blocks) {
        launch(backward<T, vector>, blocks, kThreads, 0, gate, tensors.input<T>(), gradients.output<T>(dy), steps);
      });
    });
  });
  return {gradients.gate, gradients.up, gradients.bias, gradients.row_weight};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace megamm
