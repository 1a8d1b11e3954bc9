// local_temporal between its matrix products: LN in front of the first, convolution and QuickGELU between the two, the
// residual after the second, and the same backwards. Tokens stay where they are, (B, T, L, D): the neighbours in time
// of a row lie `tokens` rows away, in cache, because frames are walked in order.
#include "core/layer_norm.h"
#include "local_temporal/local_temporal.h"

namespace mplug2::MPLUG2_ISA {
namespace {

// The frame's own row and its neighbours in time; a neighbour outside the video is null.
template <class T>
struct Neighbours {
  const T* row[3];
  Neighbours(const LocalTemporalShape& shape, const T* frames, int64_t frame)
      : row{frame % shape.frames == 0 ? nullptr : frames + (frame - 1) * shape.tokens * shape.hidden,
            frames + frame * shape.tokens * shape.hidden,
            frame % shape.frames == shape.frames - 1 ? nullptr : frames + (frame + 1) * shape.tokens * shape.hidden} {}
  // row[k][at], 0 outside the video.
  template <class Lanes>
  MPLUG2_INLINE Vec at(int k, int64_t at, Lanes lanes) const {
    return row[k] == nullptr ? Vec{} : load(row[k] + at, lanes);
  }
};

template <class T, class W>
void norm(const LocalTemporalShape& shape, const T* x, const float* weight, const float* bias, W* normed, int64_t first,
          int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * shape.width;
    if (row % shape.tokens < shape.prefix)
      std::memset(normed + at, 0, shape.width * sizeof(W));
    else
      layer_norm_row(x + at, weight, bias, normed + at, shape.width, shape.eps);
  }
}

template <class T, class Lanes>
MPLUG2_INLINE Vec convolve(const Neighbours<T>& hidden, const TemporalTaps& conv, int64_t at, int64_t i, Lanes lanes) {
  Vec mixed = load(conv.bias + i, lanes);
  for (int k = 0; k < 3; ++k) mixed += hidden.at(k, at + i, lanes) * load(conv.taps[k] + i, lanes);
  return mixed;
}

template <class W>
void mix(const LocalTemporalShape& shape, const W* hidden, TemporalTaps conv, W* act, int64_t first, int64_t last) {
  for (int64_t frame = first; frame < last; ++frame) {
    const Neighbours<W> near(shape, hidden, frame);
    W* out = act + frame * shape.tokens * shape.hidden;
    for (int64_t token = 0; token < shape.tokens; ++token) {
      const int64_t at = token * shape.hidden;
      for_lanes(shape.hidden, [&](int64_t i, auto lanes) {
        store(out + at + i, quick_gelu(convolve(near, conv, at, i, lanes)), lanes);
      });
    }
  }
}

template <class T, class W>
void finish(const LocalTemporalShape& shape, const T* x, const W* up, T* out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * shape.width;
    if (row % shape.tokens < shape.prefix)
      std::memcpy(out + at, x + at, shape.width * sizeof(T));
    else
      for_lanes(shape.width, [&](int64_t i, auto lanes) {
        store(out + at + i, load(x + at + i, lanes) + load(up + at + i, lanes), lanes);
      });
  }
}

template <class Lanes>
MPLUG2_INLINE void add_to(float* total, Vec v, Lanes lanes) {
  store(total, load(total, lanes) + v, lanes);
}

template <class T>
void mix_bwd(const LocalTemporalShape& shape, const T* hidden, TemporalTaps conv, T* dact, T* act,
             LocalTemporalSums sums, int64_t first, int64_t last) {
  for (int64_t frame = first; frame < last; ++frame) {
    const Neighbours<T> near(shape, hidden, frame);
    const int64_t start = frame * shape.tokens * shape.hidden;
    for (int64_t token = 0; token < shape.tokens; ++token) {
      const int64_t at = token * shape.hidden;
      if (token < shape.prefix) {
        std::memset(act + start + at, 0, shape.hidden * sizeof(T));
        std::memset(dact + start + at, 0, shape.hidden * sizeof(T));
        continue;
      }
      for_lanes(shape.hidden, [&](int64_t i, auto lanes) {
        const Vec mixed = convolve(near, conv, at, i, lanes);
        const Vec dmixed = load(dact + start + at + i, lanes) * quick_gelu_slope(mixed);
        store(act + start + at + i, quick_gelu(mixed), lanes);
        store(dact + start + at + i, dmixed, lanes);
        add_to(sums.dconv_bias + i, dmixed, lanes);
        for (int k = 0; k < 3; ++k) add_to(sums.dtaps[k] + i, dmixed * near.at(k, at + i, lanes), lanes);
      });
    }
  }
}

template <class T>
void shift_bwd(const LocalTemporalShape& shape, const T* dmixed, TemporalTaps conv, T* dhidden, LocalTemporalSums sums,
               int64_t first, int64_t last) {
  for (int64_t frame = first; frame < last; ++frame) {
    const Neighbours<T> near(shape, dmixed, frame);
    T* out = dhidden + frame * shape.tokens * shape.hidden;
    for (int64_t token = 0; token < shape.tokens; ++token) {
      const int64_t at = token * shape.hidden;
      for_lanes(shape.hidden, [&](int64_t i, auto lanes) {
        Vec total{};
        for (int k = 0; k < 3; ++k) total += near.at(2 - k, at + i, lanes) * load(conv.taps[k] + i, lanes);
        store(out + at + i, total, lanes);
        add_to(sums.ddown_bias + i, total, lanes);
      });
    }
  }
}

template <class T>
void norm_bwd(const LocalTemporalShape& shape, const T* dout, const T* dnormed, const T* x, const float* ln_weight,
              T* dx, LocalTemporalSums sums, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * shape.width;
    if (row % shape.tokens < shape.prefix) {
      std::memcpy(dx + at, dout + at, shape.width * sizeof(T));
      continue;
    }
    layer_norm_bwd_row(dnormed + at, x + at, ln_weight, dout + at, dx + at, sums.dln_weight, sums.dln_bias, shape.width,
                       shape.eps);
    for_lanes(shape.width,
              [&](int64_t i, auto lanes) { add_to(sums.dup_bias + i, load(dout + at + i, lanes), lanes); });
  }
}

}  // namespace

template <class T, class W>
LocalTemporalKernels<T, W> local_temporal_kernels() {
  return {norm<T, W>, mix<W>, finish<T, W>};
}
template LocalTemporalKernels<float, float> local_temporal_kernels();
template LocalTemporalKernels<Bf16, Bf16> local_temporal_kernels();
template LocalTemporalKernels<Bf16, float> local_temporal_kernels();

template <class T>
LocalTemporalBackwardKernels<T> local_temporal_backward_kernels() {
  return {mix_bwd<T>, shift_bwd<T>, norm_bwd<T>};
}
template LocalTemporalBackwardKernels<float> local_temporal_backward_kernels();
template LocalTemporalBackwardKernels<Bf16> local_temporal_backward_kernels();

}  // namespace mplug2::MPLUG2_ISA
