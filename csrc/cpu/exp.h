// exp for the loops of this folder. The C library's float32 function would prevent their vectorisation.
#pragma once

#include "number.h"

#include <cmath>

namespace megamm {

// exp(x) for x > -88.3 within 1.2 ulp, checked for every float32; below 1.2e-38 it is 0, above 2.4e38 infinity. It
// keeps a NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2), and r = x - n ln 2 computed in two steps, |r| <= ln(2) / 2 (Cody and
// Waite 1980). Of the polynomials 1 + r + ... this one has the smallest maximum relative error there, 4e-9.
MEGAMM_INLINE float exp_above(float x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  constexpr int32_t kInfinite = 0x4b400080;  // for n = 128, where 2^n is infinite; r may be large then
  float shifted = x * 1.44269504088896341f + kToInteger;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = bits < kInfinite ? bits : kInfinite;  // as integers: comparing numbers needs more instructions
  std::memcpy(&shifted, &bits, sizeof bits);
  const float n = shifted - kToInteger;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.381454174e-3f;
  p = p * r + 8.368745446e-3f;
  p = p * r + 4.166838899e-2f;
  p = p * r + 1.666652113e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t power_bits = (uint32_t(bits) + 127) << 23;  // bits of 2^n, 0 for n = -127
  float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return p * power;
}

// 1 / (1 + exp(-x)), 0 and 1 at the ends; NaN or 1 for a NaN.
MEGAMM_INLINE float sigmoid(float x) {
  constexpr int32_t kLargest = 0x42b00000;  // 88.0f; positive numbers have the same order as their bits
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = bits < kLargest ? bits : kLargest;
  std::memcpy(&x, &bits, sizeof bits);
  return 1.0f / (1.0f + exp_above(-x));
}

MEGAMM_INLINE double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace megamm
