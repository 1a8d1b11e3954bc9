// Row kernels round the product of an int8 linear, for one instruction set. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"
#include "linear/linear.h"

namespace mplug2 {

template <class T>
struct Int8LinearKernels {
  // out = round(x / s) + 128 and s = max |x| / 127, which is returned; NaN where x holds something that is not finite.
  float (*round_row)(const T* x, uint8_t* out, int64_t count);
  // out = activation(scale product + bias) + residual; bias and residual may be null.
  void (*finish_row)(Activation, const float* product, float scale, const float* bias, const T* residual, T* out,
                     int64_t count);
};

#define MPLUG2_DECLARE(isa)                   \
  namespace isa {                             \
  template <class T>                          \
  Int8LinearKernels<T> int8_linear_kernels(); \
  }
MPLUG2_DECLARE(baseline)
MPLUG2_DECLARE(avx2)
MPLUG2_DECLARE(avx512)
#undef MPLUG2_DECLARE

}  // namespace mplug2
