// Row kernels of local_temporal for one instruction set. No torch here. T is the dtype of the tensors, W the one in
// which products are made: W = T, or float32 where the CPU has no bfloat16 products.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

struct LocalTemporalShape {
  int64_t frames;  // T, of one video
  int64_t tokens;  // L, of one frame, prefix included
  int64_t prefix;  // tokens of a frame that pass through
  int64_t width;   // D
  int64_t hidden;  // D/2
  float eps;
};

// Depthwise convolution: taps[k] (hidden) multiplies the frame t + k - 1.
struct TemporalTaps {
  const float* taps[3];
  const float* bias;
};

// Sums over rows, one set per part of the rows; (hidden) or (width) floats each, added to.
struct LocalTemporalSums {
  float* dtaps[3];
  float* dconv_bias;
  float* ddown_bias;
  float* dln_weight;
  float* dln_bias;
  float* dup_bias;
};

// A row is one token of one frame: row = (video * frames + frame) * tokens + token. `first` and `last` count rows in
// norm, finish and norm_bwd, and frames (over all videos) in mix, mix_bwd and shift_bwd.
template <class T, class W>
struct LocalTemporalKernels {
  // normed = LN(x); 0 in prefix rows, which go through the products because a gap would cost more.
  void (*norm)(const LocalTemporalShape&, const T* x, const float* weight, const float* bias, W* normed, int64_t first,
               int64_t last);
  // act = QuickGELU(conv(hidden)).
  void (*mix)(const LocalTemporalShape&, const W* hidden, TemporalTaps, W* act, int64_t first, int64_t last);
  // out = x + up; x in prefix rows. up and out may be the same memory.
  void (*finish)(const LocalTemporalShape&, const T* x, const W* up, T* out, int64_t first, int64_t last);
};

template <class T>
struct LocalTemporalBackwardKernels {
  // act again, and dmixed = dact QuickGELU'(conv(hidden)), in place of dact; both 0 in prefix rows.
  void (*mix_bwd)(const LocalTemporalShape&, const T* hidden, TemporalTaps, T* dact, T* act, LocalTemporalSums,
                  int64_t first, int64_t last);
  // dhidden = the convolution's transpose of dmixed.
  void (*shift_bwd)(const LocalTemporalShape&, const T* dmixed, TemporalTaps, T* dhidden, LocalTemporalSums,
                    int64_t first, int64_t last);
  // dx = dout + the gradient of LN; dout in prefix rows.
  void (*norm_bwd)(const LocalTemporalShape&, const T* dout, const T* dnormed, const T* x, const float* ln_weight,
                   T* dx, LocalTemporalSums, int64_t first, int64_t last);
};

#define MPLUG2_DECLARE(isa)                                          \
  namespace isa {                                                    \
  template <class T, class W>                                        \
  LocalTemporalKernels<T, W> local_temporal_kernels();               \
  template <class T>                                                 \
  LocalTemporalBackwardKernels<T> local_temporal_backward_kernels(); \
  }
MPLUG2_DECLARE(baseline)
MPLUG2_DECLARE(avx2)
MPLUG2_DECLARE(avx512)
#undef MPLUG2_DECLARE

}  // namespace mplug2
