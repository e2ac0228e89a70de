// RMSNorm on a GPU, forward and backward: y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row.
//
// x [rows, width] with one row stride, weight [width] (zero_centered: 1 + weight is used), rstd [rows] in float32
// (float64 for float64). A group of kGroup threads holds a row in registers, kHeld vectors per thread, so that every
// number is read from memory once; a wider row is read twice, the second time mostly from the L2 cache.
// Backward processes the rows with as many blocks as are resident and sums dweight per block, in shared memory; the
// blocks' partial sums are added in order, so every run gives the same bits.
// Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
#include "../rms_norm.h"
#include "common.cuh"

namespace megamm {
namespace {

constexpr int kHeld = 4;       // vectors of a row that a thread holds
constexpr int kMinBlock = 128; // threads of a block; several narrow rows share one
constexpr int kWideBlock = 1024;

template <int kGroup>
constexpr int kBlock = kGroup < kMinBlock ? kMinBlock : kGroup;

// Sum over the threads of a row. `scratch` is used by groups larger than a warp, which are a whole block.
template <int kGroup, class C>
__device__ __forceinline__ C sum_in_group(C value, C* scratch) {
  if constexpr (kGroup <= kWarp) return sum_in_warp<kGroup>(value);
  return sum_in_block<kGroup>(value, scratch);
}

template <class T>
struct Forward {
  const T* x;
  int64_t x_stride;
  const T* residual;  // null for plain RMSNorm; then `sum` is not written and x itself is normalised
  int64_t residual_stride;
  T* sum;
  const T* weight;
  T* y;
  compute_t<T>* rstd;
  int64_t rows;
  int64_t width;
  compute_t<T> eps;
  compute_t<T> offset;
};

// The value to normalise in one vector: x, or x + residual rounded to T and written to `sum`.
template <class T, int kVector>
__device__ __forceinline__ Vector<T, kVector> read(const Forward<T>& p, int64_t row, int64_t column) {
  using V = Vector<T, kVector>;
  V value = *reinterpret_cast<const V*>(p.x + row * p.x_stride + column);
  if (p.residual) {
    const V second = *reinterpret_cast<const V*>(p.residual + row * p.residual_stride + column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) store(value.items[i], load(value.items[i]) + load(second.items[i]));
    *reinterpret_cast<V*>(p.sum + row * p.width + column) = value;
  }
  return value;
}

template <class T, int kVector>
__device__ __forceinline__ void write(const Forward<T>& p, int64_t row, int64_t column, const Vector<T, kVector>& value,
                                      compute_t<T> scale) {
  using V = Vector<T, kVector>;
  const V weight = *reinterpret_cast<const V*>(p.weight + column);
  V out;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    store(out.items[i], load(value.items[i]) * scale * (load(weight.items[i]) + p.offset));
  *reinterpret_cast<V*>(p.y + row * p.width + column) = out;
}

template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kBlock<kGroup>) forward_rows(Forward<T> p) {
  using C = compute_t<T>;
  constexpr int kRows = kBlock<kGroup> / kGroup;
  __shared__ C scratch[kWarp];
  const int lane = threadIdx.x % kGroup;
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kGroup;
  const bool is_row = row < p.rows;
  Vector<T, kVector> held[kHeld];
  C squares = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (k * kGroup + lane) * kVector;
    if (!is_row || column >= p.width) continue;
    held[k] = read<T, kVector>(p, row, column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += load(held[k].items[i]) * load(held[k].items[i]);
  }
  squares = sum_in_group<kGroup>(squares, scratch);
  const C scale = inverse_sqrt(squares / C(p.width) + p.eps);
  if (is_row && lane == 0) p.rstd[row] = scale;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (k * kGroup + lane) * kVector;
    if (is_row && column < p.width) write<T, kVector>(p, row, column, held[k], scale);
  }
}

// One row per block, of any width.
template <class T, int kVector>
__global__ void __launch_bounds__(kWideBlock) forward_wide(Forward<T> p) {
  using C = compute_t<T>;
  __shared__ C scratch[kWarp];
  const int64_t row = blockIdx.x, step = int64_t(kWideBlock) * kVector;
  C squares = 0;
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.width; column += step) {
    const Vector<T, kVector> value = read<T, kVector>(p, row, column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += load(value.items[i]) * load(value.items[i]);
  }
  squares = sum_in_block<kWideBlock>(squares, scratch);
  const C scale = inverse_sqrt(squares / C(p.width) + p.eps);
  if (threadIdx.x == 0) p.rstd[row] = scale;
  // Each thread reads back the values that it wrote itself.
  const T* from = p.residual ? p.sum + row * p.width : p.x + row * p.x_stride;
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.width; column += step)
    write<T, kVector>(p, row, column, *reinterpret_cast<const Vector<T, kVector>*>(from + column), scale);
}

template <class T>
struct Backward {
  const T* dy;
  int64_t dy_stride;
  const T* dx_add;  // null, or another gradient of x, which is added to dx
  int64_t add_stride;
  const T* x;
  int64_t x_stride;
  const T* weight;
  const compute_t<T>* rstd;
  T* dx;
  compute_t<T>* partial;  // [blocks, width] sums of dweight
  int64_t rows;
  int64_t width;
  compute_t<T> offset;
};

template <class T, int kVector>
__device__ __forceinline__ void write(const Backward<T>& p, int64_t row, int64_t column, const Vector<T, kVector>& x,
                                      const Vector<T, kVector>& dy, compute_t<T> scale, compute_t<T> shift) {
  using V = Vector<T, kVector>;
  const V weight = *reinterpret_cast<const V*>(p.weight + column);
  V add, out;
  if (p.dx_add) add = *reinterpret_cast<const V*>(p.dx_add + row * p.add_stride + column);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const compute_t<T> gradient = load(dy.items[i]) * (load(weight.items[i]) + p.offset) * scale;
    const compute_t<T> value = gradient - load(x.items[i]) * shift;
    store(out.items[i], p.dx_add ? value + load(add.items[i]) : value);
  }
  *reinterpret_cast<V*>(p.dx + row * p.width + column) = out;
}

template <class T, int kVector>
__device__ __forceinline__ compute_t<T> dot(const Backward<T>& p, int64_t column, const Vector<T, kVector>& x,
                                            const Vector<T, kVector>& dy) {
  const auto weight = *reinterpret_cast<const Vector<T, kVector>*>(p.weight + column);
  compute_t<T> sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum += load(dy.items[i]) * (load(weight.items[i]) + p.offset) * load(x.items[i]);
  return sum;
}

// Shared memory holds dweight of each row group, a thread's sums kThreads numbers apart: threads of a warp never access
// the same bank, and no other thread touches these sums before the end.
template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kBlock<kGroup>) backward_rows(Backward<T> p) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  constexpr int kThreads = kBlock<kGroup>, kRows = kThreads / kGroup;
  __shared__ C scratch[2][kWarp];  // two, so that one barrier per row is enough
  C* sums = shared_memory<C>() + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kHeld * kVector; ++i) sums[i * kThreads] = 0;
  const int lane = threadIdx.x % kGroup;
  int turn = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < p.rows; first += int64_t(gridDim.x) * kRows) {
    const int64_t row = first + threadIdx.x / kGroup;
    const bool is_row = row < p.rows;
    V x[kHeld], dy[kHeld];
    C product = 0;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = (k * kGroup + lane) * kVector;
      if (!is_row || column >= p.width) continue;
      x[k] = *reinterpret_cast<const V*>(p.x + row * p.x_stride + column);
      dy[k] = *reinterpret_cast<const V*>(p.dy + row * p.dy_stride + column);
      product += dot<T, kVector>(p, column, x[k], dy[k]);
    }
    product = sum_in_group<kGroup>(product, scratch[turn]);
    turn ^= 1;
    if (!is_row) continue;
    const C scale = p.rstd[row];
    const C shift = scale * scale * scale * product / C(p.width);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = (k * kGroup + lane) * kVector;
      if (column >= p.width) continue;
      write<T, kVector>(p, row, column, x[k], dy[k], scale, shift);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        sums[(k * kVector + i) * kThreads] += load(dy[k].items[i]) * load(x[k].items[i]) * scale;
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < p.width; column += kThreads) {
    const int vector = column / kVector;
    const int slot = (vector / kGroup * kVector + column % kVector) * kThreads + vector % kGroup;
    C total = 0;
    for (int group = 0; group < kRows; ++group) total += shared_memory<C>()[slot + group * kGroup];
    p.partial[int64_t(blockIdx.x) * p.width + column] = total;
  }
}

// dx of one row per block, of any width.
template <class T, int kVector>
__global__ void __launch_bounds__(kWideBlock) backward_wide(Backward<T> p) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  __shared__ C scratch[kWarp];
  const int64_t row = blockIdx.x, step = int64_t(kWideBlock) * kVector;
  const T* x = p.x + row * p.x_stride;
  const T* dy = p.dy + row * p.dy_stride;
  C product = 0;
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.width; column += step)
    product += dot<T, kVector>(p, column, *reinterpret_cast<const V*>(x + column),
                               *reinterpret_cast<const V*>(dy + column));
  product = sum_in_block<kWideBlock>(product, scratch);
  const C scale = p.rstd[row];
  const C shift = scale * scale * scale * product / C(p.width);
  for (int64_t column = int64_t(threadIdx.x) * kVector; column < p.width; column += step)
    write<T, kVector>(p, row, column, *reinterpret_cast<const V*>(x + column), *reinterpret_cast<const V*>(dy + column),
                      scale, shift);
}

// dweight of wide rows: a block sums kMinBlock columns over its share of the rows; column blocks are numbered first.
template <class T>
__global__ void __launch_bounds__(kMinBlock) weight_wide(Backward<T> p, int64_t column_blocks) {
  const int64_t column = blockIdx.x % column_blocks * kMinBlock + threadIdx.x;
  const int64_t part = blockIdx.x / column_blocks, parts = gridDim.x / column_blocks;
  if (column >= p.width) return;
  compute_t<T> total = 0;
  for (int64_t row = part; row < p.rows; row += parts)
    total += load(p.dy[row * p.dy_stride + column]) * load(p.x[row * p.x_stride + column]) * p.rstd[row];
  p.partial[part * p.width + column] = total;
}

// The backward pass for 16-bit rows needs more registers than a block of 1024 threads has.
template <class T>
constexpr int kMaxBackwardGroup = sizeof(T) == 2 ? 512 : 1024;

// Calls run with (vector width, threads per row) as constants; 0 threads if kMaxGroup threads cannot hold a row.
template <class T, int kMaxGroup, int kVector, int kGroup = 8, class F>
void choose_group(int64_t width, const F& run) {
  using Constant = std::integral_constant<int, kVector>;
  if constexpr (kGroup > kMaxGroup) {
    run(Constant{}, std::integral_constant<int, 0>{});
  } else if (width <= int64_t(kGroup) * kVector * kHeld) {
    run(Constant{}, std::integral_constant<int, kGroup>{});
  } else {
    // A group is part of a warp or a whole block, so a group of 64 does not exist.
    choose_group<T, kMaxGroup, kVector, kGroup == kWarp ? kMinBlock : 2 * kGroup>(width, run);
  }
}

template <class T, int kMaxGroup, class F>
void choose_group(int64_t width, bool vectors, const F& run) {
  if (vectors) {
    choose_group<T, kMaxGroup, kPerVector<T>>(width, run);
  } else {
    choose_group<T, kMaxGroup, 1>(width, run);
  }
}

void run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor& y, const Tensor* sum,
                 const Tensor& rstd, double eps, bool zero_centered) {
  DeviceGuard guard(x.get_device_index());
  const bool vectors = is_vectorisable(x) && is_vectorisable(weight) && (!residual || is_vectorisable(*residual));
  dispatch(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    const Forward<T> p{data_of<T>(x), row_stride(x), residual ? data_of<T>(*residual) : nullptr,
                       residual ? row_stride(*residual) : 0, sum ? mutable_data_of<T>(*sum) : nullptr,
                       data_of<T>(weight), mutable_data_of<T>(y), mutable_data_of<C>(rstd), rows_of(x),
                       x.size(x.dim() - 1), C(eps), C(zero_centered ? 1 : 0)};
    choose_group<T, 1024>(p.width, vectors, [&](auto vector, auto group) {
      constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
      if constexpr (kGroup == 0) {
        launch(forward_wide<T, kVector>, p.rows, kWideBlock, 0, x, p);
      } else {
        constexpr int kThreads = kBlock<kGroup>, kRows = kThreads / kGroup;
        launch(forward_rows<T, kVector, kGroup>, (p.rows + kRows - 1) / kRows, kThreads, 0, x, p);
      }
    });
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool zero_centered) {
  return norm_with(run_forward, x, weight, eps, zero_centered);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps, bool zero_centered) {
  return add_norm_with(run_forward, x, residual, weight, eps, zero_centered);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_any, const std::optional<Tensor>& dx_add_any,
                                             const Tensor& x_any, const Tensor& weight_any, const Tensor& rstd_any,
                                             bool zero_centered) {
  check_backward(dy_any, dx_add_any, x_any, weight_any, rstd_any);
  DeviceGuard guard(x_any.get_device_index());
  const Tensor dy = as_rows(dy_any), x = as_rows(x_any), weight = as_rows(weight_any);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  const std::optional<Tensor> dx_add = dx_add_any ? std::optional(as_rows(*dx_add_any)) : std::nullopt;
  const bool vectors = is_vectorisable(x) && is_vectorisable(dy) && is_vectorisable(weight) &&
                       (!dx_add || is_vectorisable(*dx_add));
  Tensor dx = new_empty(x), dweight = new_empty(weight);
  dispatch(x.scalar_type(), "rms_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    Backward<T> p{data_of<T>(dy), row_stride(dy), dx_add ? data_of<T>(*dx_add) : nullptr,
                  dx_add ? row_stride(*dx_add) : 0, data_of<T>(x), row_stride(x), data_of<T>(weight), data_of<C>(rstd),
                  mutable_data_of<T>(dx), nullptr, rows_of(x), x.size(x.dim() - 1), C(zero_centered ? 1 : 0)};
    choose_group<T, kMaxBackwardGroup<T>>(p.width, vectors, [&](auto vector, auto group) {
      constexpr int kVector = decltype(vector)::value, kGroup = decltype(group)::value;
      int64_t blocks;
      Tensor partial;
      const auto sums_of = [&](int64_t count) {
        blocks = count;
        partial = new_empty(x, {count, p.width}, compute_dtype(x));
        p.partial = mutable_data_of<C>(partial);
      };
      if constexpr (kGroup == 0) {
        const int64_t column_blocks = (p.width + kMinBlock - 1) / kMinBlock;
        const int64_t wanted = resident_blocks(weight_wide<T>, kMinBlock, 0, x) / column_blocks;
        sums_of(std::min(p.rows, std::max<int64_t>(1, wanted)));
        launch(backward_wide<T, kVector>, p.rows, kWideBlock, 0, x, p);
        launch(weight_wide<T>, blocks * column_blocks, kMinBlock, 0, x, p, column_blocks);
      } else {
        constexpr int kThreads = kBlock<kGroup>, kRows = kThreads / kGroup;
        const size_t shared_bytes = sizeof(C) * kHeld * kVector * kThreads;
        const int64_t resident = resident_blocks(backward_rows<T, kVector, kGroup>, kThreads, shared_bytes, x);
        sums_of(std::min((p.rows + kRows - 1) / kRows, resident));
        launch(backward_rows<T, kVector, kGroup>, blocks, kThreads, shared_bytes, x, p);
      }
      launch(add_partial<C, T>, (p.width + kWarp - 1) / kWarp, 256, 0, x, data_of<C>(partial), blocks, p.width,
             mutable_data_of<T>(dweight));
    });
  });
  return {dx, dweight};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace megamm
