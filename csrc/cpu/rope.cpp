// RoPE on a CPU: rotates the channel pairs (i, i + D / 2) of queries and keys, or rotates them back; see ../rope.h.
#include "simd.h"

// Included after load, which it uses.
#include "../rope.h"

namespace megamm {
namespace {

constexpr int64_t kBlock = 128;  // channel pairs whose sines and cosines are held at a time

template <class T>
MEGAMM_INLINE void rotate_heads(const Heads<T>& heads, int64_t token, int64_t row, int64_t rows, int64_t pairs,
                                int64_t first, int64_t count, const compute_t<T>* cosine, const compute_t<T>* sine) {
  const T* from = heads.from + token * heads.token_stride + row * heads.row_stride + first;
  T* to = heads.to + (token * rows + row) * heads.count * 2 * pairs + first;
  for (int64_t head = 0; head < heads.count; ++head, from += heads.head_stride, to += 2 * pairs) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const compute_t<T> low = load(from[i]), high = load(from[i + pairs]);
      store(to[i], low * cosine[i] - high * sine[i]);
      store(to[i + pairs], high * cosine[i] + low * sine[i]);
    }
  }
}

// Rotates the heads of tokens begin to end, counted through [tokens, rows].
template <class T>
MEGAMM_CLONES void rotate_tokens(const Rotation<T> p, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  float angle[kBlock];
  C cosine[kBlock], sine[kBlock];
  const C factor = p.factor, sine_factor = p.factor * p.direction;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t token = index / p.rows, row = index % p.rows;
    const int64_t* position = p.position + row * p.row_stride + token * p.token_stride;
    for (int64_t first = 0; first < p.pairs; first += kBlock) {
      const int64_t count = p.pairs - first < kBlock ? p.pairs - first : kBlock;
      for (int64_t i = 0; i < count; ++i) angle[i] = 0;
      for (int64_t axis = 0; axis < p.axes; ++axis) {
        const float at = float(position[axis * p.axis_stride]);
        const float* frequency = p.frequency + axis * p.pairs + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) angle[i] += at * frequency[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const Turn<C> turn = turn_of<C>(angle[i]);
        cosine[i] = turn.cosine * factor;
        sine[i] = turn.sine * sine_factor;
      }
      rotate_heads(p.query, token, row, p.rows, p.pairs, first, count, cosine, sine);
      rotate_heads(p.key, token, row, p.rows, p.pairs, first, count, cosine, sine);
    }
  }
}

std::tuple<Tensor, Tensor> rope(const Tensor& query, const Tensor& key, const Tensor& position,
                                const Tensor& frequency, double factor, bool inverse) {
  const RotationTensors tensors = rotation_tensors(query, key, position, frequency);
  dispatch(query.scalar_type(), "rope", [&](auto zero) {
    using T = decltype(zero);
    const Rotation<T> p = tensors.rotation<T>(factor, inverse);
    const int64_t width = 2 * p.pairs * (p.query.count + p.key.count);
    torch::stable::parallel_for(0, p.tokens * p.rows, grain(width),
                                [&](int64_t begin, int64_t end) { rotate_tokens<T>(p, begin, end); });
  });
  return {tensors.rotated_query, tensors.rotated_key};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, CPU, m) {
  m.impl("rope", TORCH_BOX(&rope));
}

}  // namespace megamm
