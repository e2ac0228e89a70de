// RoPE on a GPU: rotates the channel pairs (i, i + D / 2) of queries and keys, or rotates them back; see ../rope.h.
//
// A thread takes one vector of pairs of kHeld heads of a token: it computes their sines and cosines once, so that
// neither a table is read nor an angle kept for backward. Heads of queries come first, then those of keys.
#include "common.cuh"

// Included after load and MEGAMM_INLINE, which it uses.
#include "../rope.h"

namespace megamm {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 4;

// One thread's share: counts of vectors in D / 2 and of chunks of kHeld heads.
struct Share {
  int64_t vectors, chunks;
};

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) rotate(Rotation<T> p, Share share) {
  using C = compute_t<T>;
  using V = Vector<T, kVector>;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, group = index / share.vectors;
  const int64_t first = index % share.vectors * kVector, chunk = group % share.chunks, token_row = group / share.chunks;
  if (token_row >= p.tokens * p.rows) return;
  const int64_t token = token_row / p.rows, row = token_row % p.rows;
  V low[kHeld], high[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t head = chunk * kHeld + k, in_key = head - p.query.count;
    if (in_key >= p.key.count) continue;
    const T* from = in_key < 0 ? p.query.from + token * p.query.token_stride + row * p.query.row_stride +
                                     head * p.query.head_stride
                               : p.key.from + token * p.key.token_stride + row * p.key.row_stride +
                                     in_key * p.key.head_stride;
    low[k] = *reinterpret_cast<const V*>(from + first);
    high[k] = *reinterpret_cast<const V*>(from + first + p.pairs);
  }
  float angle[kVector] = {};
  for (int64_t axis = 0; axis < p.axes; ++axis) {
    const float at = float(p.position[row * p.row_stride + axis * p.axis_stride + token * p.token_stride]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) angle[i] += at * p.frequency[axis * p.pairs + first + i];
  }
  C cosine[kVector], sine[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const Turn<C> turn = turn_of<C>(angle[i]);
    cosine[i] = turn.cosine * p.factor;
    sine[i] = turn.sine * (p.factor * p.direction);
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int64_t head = chunk * kHeld + k, in_key = head - p.query.count;
    if (in_key >= p.key.count) continue;
    T* to = in_key < 0 ? p.query.to + (token_row * p.query.count + head) * 2 * p.pairs
                       : p.key.to + (token_row * p.key.count + in_key) * 2 * p.pairs;
    V rotated_low, rotated_high;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const C a = load(low[k].items[i]), b = load(high[k].items[i]);
      store(rotated_low.items[i], a * cosine[i] - b * sine[i]);
      store(rotated_high.items[i], b * cosine[i] + a * sine[i]);
    }
    *reinterpret_cast<V*>(to + first) = rotated_low;
    *reinterpret_cast<V*>(to + first + p.pairs) = rotated_high;
  }
}

// Whether each half of every head can be read in 16-byte vectors.
bool has_aligned_heads(const Tensor& t) {
  const int64_t per_vector = 16 / int64_t(t.element_size());
  bool aligned = t.size(3) / 2 % per_vector == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned &= t.size(axis) == 1 || t.stride(axis) % per_vector == 0;
  return aligned;
}

template <class T, int kVector>
void run(const Rotation<T>& p, const Tensor& on) {
  const Share share{p.pairs / kVector, (p.query.count + p.key.count + kHeld - 1) / kHeld};
  const int64_t threads = p.tokens * p.rows * share.chunks * share.vectors;
  launch(rotate<T, kVector>, (threads + kThreads - 1) / kThreads, kThreads, 0, on, p, share);
}

std::tuple<Tensor, Tensor> rope(const Tensor& query, const Tensor& key, const Tensor& position,
                                const Tensor& frequency, double factor, bool inverse) {
  DeviceGuard guard(query.get_device_index());
  const RotationTensors tensors = rotation_tensors(query, key, position, frequency);
  const bool vectors = has_aligned_heads(tensors.query) && has_aligned_heads(tensors.key);
  dispatch(query.scalar_type(), "rope", [&](auto zero) {
    using T = decltype(zero);
    const Rotation<T> p = tensors.rotation<T>(factor, inverse);
    vectors ? run<T, kPerVector<T>>(p, query) : run<T, 1>(p, query);
  });
  return {tensors.rotated_query, tensors.rotated_key};
}

}  // namespace

MEGAMM_KERNELS(MEGAMM_LIBRARY, MEGAMM_CUDA_KEY, m) {
  m.impl("rope", TORCH_BOX(&rope));
}

}  // namespace megamm
