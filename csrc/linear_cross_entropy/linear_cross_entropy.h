// Row kernels of linear_cross_entropy for one instruction set. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

struct LinearCrossEntropyShape {
  int64_t vocabulary;
  int64_t ignore_index;
  float label_smoothing;
};

template <class T>
struct LinearCrossEntropyKernels {
  // loss and lse of each row of logits (rows, vocabulary).
  void (*fwd)(const LinearCrossEntropyShape&, const T* logits, const int64_t* targets, float* loss, float* lse,
              int64_t rows);
  // logits become their gradient: dloss (softmax - (1 - a) onehot - a / V).
  void (*bwd)(const LinearCrossEntropyShape&, T* logits, const int64_t* targets, const float* dloss, const float* lse,
              int64_t rows);
};

namespace baseline {
template <class T>
LinearCrossEntropyKernels<T> linear_cross_entropy_kernels();
}
namespace avx2 {
template <class T>
LinearCrossEntropyKernels<T> linear_cross_entropy_kernels();
}
namespace avx512 {
template <class T>
LinearCrossEntropyKernels<T> linear_cross_entropy_kernels();
}

}  // namespace mplug2
