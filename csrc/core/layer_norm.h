// One row of layer normalisation, forward and backward, for the row kernels of several ops. The row is read three times
// from the first-level cache; statistics are float32, two passes (mean, then centred squares).
#pragma once
#include "core/vec.h"

namespace mplug2::MPLUG2_ISA {

struct RowStats {
  float mean;
  float rstd;  // 1 / sqrt(variance + eps)
};

template <class T>
MPLUG2_INLINE RowStats row_stats(const T* x, int64_t width, float eps) {
  Vec total{};
  for_lanes(width, [&](int64_t i, auto lanes) { total += load(x + i, lanes); });
  const float mean = sum(total) / width;
  Vec squares{};
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vec centred = keep(load(x + i, lanes) - mean, lanes, 0.0f);
    squares += centred * centred;
  });
  return {mean, 1.0f / __builtin_sqrtf(sum(squares) / width + eps)};
}

// out = (x - mean) rstd weight + bias
template <class T, class Out>
MPLUG2_INLINE void layer_norm_row(const T* x, const float* weight, const float* bias, Out* out, int64_t width,
                                  float eps) {
  const RowStats stats = row_stats(x, width, eps);
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vec normal = (load(x + i, lanes) - stats.mean) * stats.rstd;
    store(out + i, normal * load(weight + i, lanes) + load(bias + i, lanes), lanes);
  });
}

// With y = (x - mean) rstd and g = dout weight: dx = rest + rstd (g - mean(g) - y mean(g y)); dweight += dout y; dbias
// += dout.
template <class T>
MPLUG2_INLINE void layer_norm_bwd_row(const T* dout, const T* x, const float* weight, const T* rest, T* dx,
                                      float* dweight, float* dbias, int64_t width, float eps) {
  const RowStats stats = row_stats(x, width, eps);
  Vec g_total{}, gy_total{};
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vec dy = load(dout + i, lanes);
    const Vec y = (load(x + i, lanes) - stats.mean) * stats.rstd;
    const Vec g = dy * load(weight + i, lanes);
    g_total += g;
    gy_total += g * y;
    store(dweight + i, load(dweight + i, lanes) + dy * y, lanes);
    store(dbias + i, load(dbias + i, lanes) + dy, lanes);
  });
  const float g_mean = sum(g_total) / width, gy_mean = sum(gy_total) / width;
  for_lanes(width, [&](int64_t i, auto lanes) {
    const Vec y = (load(x + i, lanes) - stats.mean) * stats.rstd;
    const Vec g = load(dout + i, lanes) * load(weight + i, lanes);
    store(dx + i, load(rest + i, lanes) + stats.rstd * (g - g_mean - y * gy_mean), lanes);
  });
}

}  // namespace mplug2::MPLUG2_ISA
