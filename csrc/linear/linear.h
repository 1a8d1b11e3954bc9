// Row kernels of linear for one instruction set: what follows the product. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

enum class Activation { kNone, kGelu, kQuickGelu };

// Columns that `few_rows` takes at a time at most.
constexpr int64_t kFewColumns = 32;

// out (rows, columns) = activation(x weight^T + bias) + residual; bias and residual may be null.
template <class T>
struct FewRows {
  const float* x;   // (rows, depth)
  const T* weight;  // (columns, depth), rows weight_stride apart
  const T* bias;
  const T* residual;  // as out
  T* out;
  T* pre;  // as out: what goes into the activation, or null
  int64_t rows, depth, columns, weight_stride;
};

template <class T, class W>
struct LinearKernels {
  // out = activation(pre) + residual (which may be null); pre and out may be the same memory. pre is W, the rest T.
  void (*finish)(Activation, const W* pre, const T* residual, T* out, int64_t count);
  // dpre = dout activation'(pre)
  void (*activation_bwd)(Activation, const T* dout, const T* pre, W* dpre, int64_t count);
  // Columns [first, last) of out, at most kFewColumns.
  void (*few_rows)(const FewRows<T>&, Activation, int64_t first, int64_t last);
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
