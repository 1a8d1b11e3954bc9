// Row kernels of linear for one instruction set: what follows the product. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

enum class Activation { kNone, kGelu, kQuickGelu };

template <class T, class W>
struct LinearKernels {
  // out = activation(pre) + residual (which may be null); pre and out may be the same memory. pre is W, the rest T.
  void (*finish)(Activation, const W* pre, const T* residual, T* out, int64_t count);
  // dpre = dout activation'(pre)
  void (*activation_bwd)(Activation, const T* dout, const T* pre, W* dpre, int64_t count);
};

namespace baseline {
template <class T, class W>
LinearKernels<T, W> linear_kernels();
}
namespace avx2 {
template <class T, class W>
LinearKernels<T, W> linear_kernels();
}
namespace avx512 {
template <class T, class W>
LinearKernels<T, W> linear_kernels();
}

}  // namespace mplug2
