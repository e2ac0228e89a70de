// exp in the loops of this folder. The C library's float32 function would keep them from being vectorised.
#pragma once

#include "number.h"

#include <cmath>

namespace megamm {

// exp(x) for -88.3 < x < 88.3 within 1.2 ulp, checked for every float32; results below 1.2e-38 are 0. A NaN stays one.
// exp(x) = 2^n exp(r) with n = round(x / ln 2), and r = x - n ln 2 taken in two steps, |r| <= ln(2) / 2 (Cody and Waite
// 1980). The polynomial has the smallest largest relative error there, 4e-9, of those that begin with 1 + r.
MEGAMM_INLINE float exp_within(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.381454174e-3f;
  p = p * r + 8.368745446e-3f;
  p = p * r + 4.166838899e-2f;
  p = p * r + 1.666652113e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // of 2^n, 0 for n = -127
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// 1 / (1 + exp(-x)), 0 and 1 at the ends; of a NaN any number between. Where x is negative it is exp(x) / (1 + exp(x)).
MEGAMM_INLINE float sigmoid(float x) {
  constexpr uint32_t kLargest = 0x42b00000;  // 88.0f, where exp_within gives 0 for the negative
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7fffffff;
  bits = bits < kLargest ? bits : kLargest;  // as integers: comparisons of numbers need more instructions
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  const float e = exp_within(-magnitude);
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

MEGAMM_INLINE double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace megamm
