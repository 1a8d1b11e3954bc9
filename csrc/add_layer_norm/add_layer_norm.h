// Row kernels of add_layer_norm for one instruction set. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

template <class T>
struct AddLayerNormKernels {
  // sum = x + residual; normed = LN(sum): rows x width, contiguous.
  void (*fwd)(const T* x, const T* residual, const float* weight, const float* bias, T* normed, T* sum, int64_t rows,
              int64_t width, float eps);
  // dx = dsum + the gradient of LN; dweight and dbias (width) are added to.
  void (*bwd)(const T* dnormed, const T* dsum, const T* sum, const float* weight, T* dx, float* dweight, float* dbias,
              int64_t rows, int64_t width, float eps);
};

namespace baseline {
template <class T>
AddLayerNormKernels<T> add_layer_norm_kernels();
}
namespace avx2 {
template <class T>
AddLayerNormKernels<T> add_layer_norm_kernels();
}
namespace avx512 {
template <class T>
AddLayerNormKernels<T> add_layer_norm_kernels();
}

}  // namespace mplug2
