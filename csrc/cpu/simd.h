// Plain loops that the compiler vectorises: number types and their conversions, one clone per instruction set.
//
// A function marked MEGAMM_CLONES is compiled for AVX-512, AVX2 and the baseline; the loader takes the best that the
// processor has. What it calls must be MEGAMM_INLINE, or it would be compiled for the baseline alone.
#pragma once

#include "../common.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MEGAMM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGAMM_CLONES
#endif
#define MEGAMM_INLINE inline __attribute__((always_inline))

namespace megamm {

struct BFloat16 {
  uint16_t bits;
};

#ifdef __FLT16_MAX__
using Half = _Float16;
#endif

// The type that numbers of type T are computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

MEGAMM_INLINE double load(double x) { return x; }
MEGAMM_INLINE float load(float x) { return x; }
MEGAMM_INLINE float load(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
#ifdef __FLT16_MAX__
MEGAMM_INLINE float load(Half x) { return float(x); }
MEGAMM_INLINE void store(Half& to, float x) { to = Half(x); }
#endif
MEGAMM_INLINE void store(double& to, double x) { to = x; }
MEGAMM_INLINE void store(float& to, float x) { to = x; }
// To the nearest, ties to even; a NaN stays one.
MEGAMM_INLINE void store(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// Calls f with a zero of the C++ type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float(0));
    case ScalarType::Double: return f(double(0));
    case ScalarType::BFloat16: return f(BFloat16{0});
#ifdef __FLT16_MAX__
    case ScalarType::Half: return f(Half(0));
#endif
    default: STD_TORCH_CHECK(false, op, " on a CPU takes float64, float32, bfloat16 and float16, not this dtype");
  }
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// So many rows that a thread's share is worth its start (about 32K elements).
inline int64_t grain(int64_t width) { return width > 32768 ? 1 : 32768 / (width > 0 ? width : 1); }

template <class T>
MEGAMM_CLONES void add_blocks(const compute_t<T>* partial, int64_t blocks, int64_t width, T* to) {
  for (int64_t begin = 0; begin < width; begin += 64) {  // 64 columns at a time stay in registers or first cache
    compute_t<T> sums[64] = {};
    const int64_t columns = width - begin < 64 ? width - begin : 64;
    for (int64_t block = 0; block < blocks; ++block)
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) sums[i] += partial[block * width + begin + i];
    for (int64_t i = 0; i < columns; ++i) store(to[begin + i], sums[i]);
  }
}

// Partial sums [blocks, width] added in order, in the dtype of `like` [width].
inline Tensor sum_of_blocks(const Tensor& partial, const Tensor& like) {
  Tensor total = new_empty(like, {partial.size(1)}, like.scalar_type());
  dispatch(like.scalar_type(), "sum_of_blocks", [&](auto zero) {
    using T = decltype(zero);
    add_blocks<T>(data_of<compute_t<T>>(partial), partial.size(0), partial.size(1), mutable_data_of<T>(total));
  });
  return total;
}

}  // namespace megamm
