// RMSNorm on a CPU, forward and backward: y = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps) of each row.
//
// x [rows, width] with one row stride, weight [width] (zero_centered: 1 + weight is used), rstd [rows] in float32
// (float64 for float64). A row is read from memory once: its second pass finds it in the cache.
// Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
#include "../rms_norm.h"
#include "simd.h"

namespace megamm {
namespace {

// The factors of rows, in the type used for computing: converted once, not for every row.
template <class T>
MEGAMM_CLONES void widen(const T* weight, double offset, compute_t<T>* factor, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) factor[i] = load(weight[i]) + compute_t<T>(offset);
}

Tensor factor_of(const Tensor& weight, bool zero_centered) {
  Tensor factor = new_empty(weight, {weight.size(0)}, compute_dtype(weight));
  dispatch(weight.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    widen<T>(data_of<T>(weight), zero_centered ? 1 : 0, mutable_data_of<compute_t<T>>(factor), weight.size(0));
  });
  return factor;
}

// `residual` may be null; then `sum` is not written and x itself is normalised.
template <class T>
MEGAMM_CLONES void forward_rows(
    const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, T* sum, const compute_t<T>* factor, T* y,
    compute_t<T>* rstd, int64_t begin, int64_t end, int64_t width, double eps) {
  using C = compute_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * x_stride;
    C squares;
    if (residual) {
      const T* second = residual + row * residual_stride;
      T* total = sum + row * width;
      squares = sum_of<C>(width, [=](int64_t i) MEGAMM_LAMBDA {
        const C value = rounded<T>(load(in[i]) + load(second[i]));
        store(total[i], value);
        return value * value;
      });
      in = total;
    } else {
      squares = sum_of<C>(width, [=](int64_t i) MEGAMM_LAMBDA { return load(in[i]) * load(in[i]); });
    }
    const C scale = C(1) / std::sqrt(squares / C(width) + C(eps));
    rstd[row] = scale;
    T* out = y + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(out[i], load(in[i]) * scale * factor[i]);
  }
}

// dx = rstd * (w * dy - x * rstd^2 * mean(w * dy * x)) + dx_add, and dw += dy * x * rstd over these rows.
template <class T>
MEGAMM_CLONES void backward_rows(
    const T* dy, int64_t dy_stride, const T* dx_add, int64_t add_stride, const T* x, int64_t x_stride,
    const compute_t<T>* factor, const compute_t<T>* rstd, T* dx, compute_t<T>* dweight, int64_t begin, int64_t end,
    int64_t width) {
  using C = compute_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* in = x + row * x_stride;
    const T* grad = dy + row * dy_stride;
    const C scale = rstd[row];
    const C dot = sum_of<C>(width, [=](int64_t i) MEGAMM_LAMBDA {
      const C product = load(grad[i]) * load(in[i]);
      dweight[i] += product * scale;
      return product * factor[i];
    });
    const C shift = scale * scale * scale * dot / C(width);
    T* out = dx + row * width;
    if (dx_add) {
      const T* add = dx_add + row * add_stride;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        store(out[i], load(grad[i]) * factor[i] * scale - load(in[i]) * shift + load(add[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i)
        store(out[i], load(grad[i]) * factor[i] * scale - load(in[i]) * shift);
    }
  }
}

// Runs forward_rows over all rows; `residual` and `sum` are null for plain RMSNorm.
void run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor& y, const Tensor* sum,
                 const Tensor& rstd, double eps, bool zero_centered) {
  const int64_t width = x.size(x.dim() - 1);
  const Tensor factor = factor_of(weight, zero_centered);
  dispatch(x.scalar_type(), "rms_norm", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, rows_of(x), grain(width), [&](int64_t begin, int64_t end) {
      forward_rows<T>(data_of<T>(x), row_stride(x), residual ? data_of<T>(*residual) : nullptr,
                      residual ? row_stride(*residual) : 0, sum ? mutable_data_of<T>(*sum) : nullptr,
                      data_of<compute_t<T>>(factor), mutable_data_of<T>(y), mutable_data_of<compute_t<T>>(rstd), begin,
                      end, width, eps);
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
  const Tensor dy = as_rows(dy_any), x = as_rows(x_any), weight = as_rows(weight_any);
  const Tensor factor = factor_of(weight, zero_centered);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  const std::optional<Tensor> dx_add = dx_add_any ? std::optional(as_rows(*dx_add_any)) : std::nullopt;
  const int64_t rows = rows_of(x), width = x.size(x.dim() - 1);
  // Blocks depend only on the shape: dweight is bit-identical for any number of threads.
  const int64_t per_block = std::max<int64_t>(grain(width), (rows + 63) / 64);
  const int64_t blocks = (rows + per_block - 1) / per_block;
  Tensor dx = new_empty(x);
  Tensor partial = torch::stable::new_zeros(x, std::vector<int64_t>{blocks, width}, compute_dtype(x));
  dispatch(x.scalar_type(), "rms_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        backward_rows<T>(data_of<T>(dy), row_stride(dy), dx_add ? data_of<T>(*dx_add) : nullptr,
                         dx_add ? row_stride(*dx_add) : 0, data_of<T>(x), row_stride(x),
                         data_of<compute_t<T>>(factor), data_of<compute_t<T>>(rstd), mutable_data_of<T>(dx),
                         mutable_data_of<compute_t<T>>(partial) + block * width, block * per_block,
                         std::min(rows, (block + 1) * per_block), width);
    });
  });
  return {dx, sum_of_blocks(partial, weight)};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace megamm
