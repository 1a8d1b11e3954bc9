// The product with its epilogue in one kernel, as host code sees it, without torch or CUTLASS. Each run_product is
// compiled in a file of its own, inst/*_sm80.cu.
#pragma once
#include "core/device.h"

namespace mplug2::linear {

// pre = x weight^T + bias, out = activation(pre) + residual. Contiguous, aligned to 16 bytes.
template <class T>
struct ProductParams {
  const T* x;              // (rows, depth)
  const T* weight;         // (width, depth)
  const T* bias;           // (width), or null
  const T* residual;       // (rows, width), or null
  T* pre;                  // (rows, width), or null where it is not kept
  T* out;                  // (rows, width)
  int rows, width, depth;  // width and depth are multiples of 8
};

// Of out, computed by one block.
constexpr int kProductRows = 128;
constexpr int kProductColumns = 256;

// Starts the kernel on a CUDA stream: null, or what CUDA says went wrong.
template <class T, class Activation>
const char* run_product(const ProductParams<T>& params, void* stream);

}  // namespace mplug2::linear
