// add_layer_norm row by row: the sum is rounded to its dtype and stored, then normalised from the first-level cache, so
// each tensor crosses memory once.
#include "add_layer_norm/add_layer_norm.h"
#include "core/layer_norm.h"

namespace mplug2::MPLUG2_ISA {
namespace {

template <class T>
void add_layer_norm_fwd(const T* x, const T* residual, const float* weight, const float* bias, T* normed, T* sum,
                        int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * width;
    for_lanes(width, [&](int64_t i, auto lanes) {
      store(sum + at + i, load(x + at + i, lanes) + load(residual + at + i, lanes), lanes);
    });
    layer_norm_row(sum + at, weight, bias, normed + at, width, eps);
  }
}

template <class T>
void add_layer_norm_bwd(const T* dnormed, const T* dsum, const T* sum, const float* weight, T* dx, float* dweight,
                        float* dbias, int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * width;
    layer_norm_bwd_row(dnormed + at, sum + at, weight, dsum + at, dx + at, dweight, dbias, width, eps);
  }
}

}  // namespace

template <class T>
AddLayerNormKernels<T> add_layer_norm_kernels() {
  return {add_layer_norm_fwd<T>, add_layer_norm_bwd<T>};
}
template AddLayerNormKernels<float> add_layer_norm_kernels();
template AddLayerNormKernels<Bf16> add_layer_norm_kernels();

}  // namespace mplug2::MPLUG2_ISA
