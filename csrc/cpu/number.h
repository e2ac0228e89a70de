// Number types on a CPU and their conversions to and from the type used for computing.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Functions called in a vectorised loop must be inlined into it, or they would be compiled for the baseline only.
#define MEGAMM_INLINE inline __attribute__((always_inline))
#define MEGAMM_LAMBDA __attribute__((always_inline))

namespace megamm {

struct BFloat16 {
  uint16_t bits;
};

using Half = _Float16;

MEGAMM_INLINE double load(double x) { return x; }
MEGAMM_INLINE float load(float x) { return x; }
MEGAMM_INLINE float load(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
MEGAMM_INLINE float load(Half x) { return float(x); }
MEGAMM_INLINE float load(uint8_t x) { return float(x); }
MEGAMM_INLINE void store(Half& to, float x) { to = Half(x); }
MEGAMM_INLINE void store(double& to, double x) { to = x; }
MEGAMM_INLINE void store(float& to, float x) { to = x; }
// Rounds to nearest, ties to even; keeps a NaN.
MEGAMM_INLINE void store(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0);
}

// The value of x after a store and a load. (Storing to a variable and loading it would not be vectorised.)
template <class T, class C>
MEGAMM_INLINE C rounded(C x) {
  if constexpr (sizeof(T) == sizeof(C)) return x;
  if constexpr (std::is_same_v<T, Half>) return C(Half(x));
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return x == x ? value : x;
}

}  // namespace megamm
