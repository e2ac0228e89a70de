// Converts a tensor's dtype to a C++ type: the CPU's number types (cpu/number.h) or CUDA's (cuda/common.cuh), whichever
// was included before.
#pragma once

#include "common.h"

namespace megamm {

// Calls f with a zero of the C++ type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float(0));
    case ScalarType::Double: return f(double(0));
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, op, " takes float64, float32, bfloat16 and float16, not this dtype");
  }
}

}  // namespace megamm
