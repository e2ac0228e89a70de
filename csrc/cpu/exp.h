// The exponential function without branches, so that loops over it are vectorised.
#pragma once

#include "simd.h"

namespace megamm {

// Within 2 units in the last place; 0 below 2.4e-38, inf above the largest number; a NaN stays one.
// exp(x) = 2^n * exp(r) with n the integer next to x / log(2), by a polynomial on |r| <= log(2) / 2 (Cephes, Moshier).
MEGAMM_INLINE float exp_of(float x) {
  const float lowest = -86.6433f, highest = 88.72283f;
  float y = x < lowest ? lowest : x;
  y = y > highest ? highest : y;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const float shifted = y * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: for n = 128 one would be inf.
  const uint32_t half_bits = ((bits + 127) << 23) - (1u << 23);
  float half;
  std::memcpy(&half, &half_bits, sizeof half);
  const float value = p * half * 2.0f;
  return x < lowest ? 0.0f : (x > highest ? x * 1e38f : value);
}

MEGAMM_INLINE double exp_of(double x) { return std::exp(x); }

}  // namespace megamm
