// Common parts of RoPE for CPU and CUDA: the formulas, the operands as kernels read them, the check of arguments.
//
// Included after the device's load and MEGAMM_INLINE, which it uses.
// Sources: Su et al. 2021, "RoFormer"; Cody and Waite 1980 (reduction of the angle); the polynomials are those of
// Cephes (float) and fdlibm (double).
#pragma once

#include "common.h"

namespace megamm {

template <class C>
struct Turn {
  C cosine, sine;
};

// Cosine and sine of r, which is at most pi / 4 from 0, or a little more.
MEGAMM_INLINE Turn<float> turn_near_zero(float r) {
  const float z = r * r;
  const float sine = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const float high = 4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f);
  return {1 - 0.5f * z + z * z * high, sine};
}

MEGAMM_INLINE Turn<double> turn_near_zero(double r) {
  const double z = r * r;
  const double s = 8.33333333332248946124e-3 +
                   z * (-1.98412698298579493134e-4 +
                        z * (2.75573137070700676789e-6 +
                             z * (-2.50507602534068634195e-8 + z * 1.58969099521155010221e-10)));
  const double c = 4.16666666666666019037e-2 +
                   z * (-1.38888888888741095749e-3 +
                        z * (2.48015872894767294178e-5 +
                             z * (-2.75573143513906633035e-7 +
                                  z * (2.08757232129817482790e-9 + z * -1.13596475577881948265e-11))));
  return {1 - 0.5 * z + z * z * c, r + r * z * (-1.66666666666666324348e-1 + z * s)};
}

// 1.5 * 2^52. A number below 2^51 that is added to it loses its fraction, so that (x + kToInteger) - kToInteger is the
// nearest integer. Compilers keep this as it is written unless they are told to reorder sums.
constexpr double kToInteger = 6755399441055744.0;

// Cosine and sine of an angle up to 2^24 radians; NaN for one that is not finite. The library's functions would not be
// vectorised on a CPU, and need a stack on a GPU.
// angle = n pi / 2 + r. The first part of pi / 2 has 33 bits: its product with n is exact for n < 2^20, and beyond that
// off by 2e-9 at most.
template <class C>
MEGAMM_INLINE Turn<C> turn_of(float angle) {
  const double n = (angle * 0.63661977236758134308 + kToInteger) - kToInteger;
  const C r = C((angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11);
  const Turn<C> near = turn_near_zero(r);
  const C quarter = C(n - 4 * ((n * 0.25 + kToInteger) - kToInteger));  // n modulo 4, from -2 to 2
  const bool is_odd = quarter * quarter == 1;
  const C cosine = is_odd ? near.sine : near.cosine, sine = is_odd ? near.cosine : near.sine;
  return {(quarter > 0) | (quarter < -1) ? -cosine : cosine, (quarter < 0) | (quarter > 1) ? -sine : sine};
}

// Heads [tokens, rows, count, 2 pairs] and their result, which is contiguous; strides count elements.
template <class T>
struct Heads {
  const T* from;
  T* to;
  int64_t token_stride, row_stride, head_stride;
  int64_t count;
};

template <class T>
struct Rotation {
  Heads<T> query, key;
  const int64_t* position;  // [rows, axes, tokens]
  int64_t row_stride, axis_stride, token_stride;
  const float* frequency;  // [axes, pairs]
  int64_t axes, tokens, rows, pairs;
  compute_t<T> factor;
  compute_t<T> direction;  // -1 for the inverse rotation, otherwise 1
};

namespace {  // torch's headers hide Tensor: types that hold one must not be visible outside a file either

// The operands as tensors: heads with a contiguous last axis, frequencies contiguous; and the results.
struct RotationTensors {
  Tensor query, key, position, frequency, rotated_query, rotated_key;

  template <class T>
  static Heads<T> heads(const Tensor& from, const Tensor& to) {
    return {data_of<T>(from), mutable_data_of<T>(to), from.stride(0), from.stride(1), from.stride(2), from.size(2)};
  }

  template <class T>
  Rotation<T> rotation(double factor, bool inverse) const {
    using C = compute_t<T>;
    return {heads<T>(query, rotated_query),
            heads<T>(key, rotated_key),
            data_of<int64_t>(position),
            position.stride(0),
            position.stride(1),
            position.stride(2),
            data_of<float>(frequency),
            position.size(1),
            query.size(0),
            query.size(1),
            query.size(3) / 2,
            C(factor),
            C(inverse ? -1 : 1)};
  }
};

inline Tensor with_contiguous_heads(const Tensor& t) {
  return t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

// Checks what kernels assume about each tensor and prepares it for them.
inline RotationTensors rotation_tensors(const Tensor& query, const Tensor& key, const Tensor& position,
                                        const Tensor& frequency) {
  check_like(key, query, "rope", "key");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && key.size(0) == query.size(0) && key.size(1) == query.size(1) &&
                      key.size(3) == query.size(3) && query.size(3) % 2 == 0,
                  "rope: query and key must be [S, B, heads, D] with the same S, B and even D");
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long && position.device() == query.device() &&
                      position.dim() == 3 && position.size(0) == query.size(1) && position.size(2) == query.size(0),
                  "rope: position must be int64 [B, axes, S], on the device of query");
  STD_TORCH_CHECK(frequency.scalar_type() == ScalarType::Float && frequency.device() == query.device() &&
                      frequency.dim() == 2 && frequency.size(0) == position.size(1) &&
                      frequency.size(1) == query.size(3) / 2,
                  "rope: frequency must be float32 [axes, D / 2], on the device of query");
  return {with_contiguous_heads(query),
          with_contiguous_heads(key),
          position,
          torch::stable::contiguous(frequency),
          new_empty(query),
          new_empty(key)};
}

}  // namespace
}  // namespace megamm
