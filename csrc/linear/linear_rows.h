// The activation and the residual of linear in one pass over the product, and the activation's slope in the backward
// pass.
#include "core/vec.h"
#include "linear/linear.h"

namespace mplug2::MPLUG2_ISA {
namespace {

// Calls f with the activation as a compile-time constant.
template <class F>
MPLUG2_INLINE void with_activation(Activation activation, F f) {
  if (activation == Activation::kGelu)
    f([](Vec x) { return gelu(x); }, [](Vec x) { return gelu_slope(x); });
  else if (activation == Activation::kQuickGelu)
    f([](Vec x) { return quick_gelu(x); }, [](Vec x) { return quick_gelu_slope(x); });
  else
    f([](Vec x) { return x; }, [](Vec) { return splat(1.0f); });
}

template <class T, class W>
void finish(Activation activation, const W* pre, const T* residual, T* out, int64_t count) {
  with_activation(activation, [&](auto act, auto) {
    if (residual == nullptr)
      for_lanes(count, [&](int64_t i, auto lanes) { store(out + i, act(load(pre + i, lanes)), lanes); });
    else
      for_lanes(count, [&](int64_t i, auto lanes) {
        store(out + i, act(load(pre + i, lanes)) + load(residual + i, lanes), lanes);
      });
  });
}

template <class T, class W>
void activation_bwd(Activation activation, const T* dout, const T* pre, W* dpre, int64_t count) {
  with_activation(activation, [&](auto, auto slope) {
    for_lanes(count, [&](int64_t i, auto lanes) {
      store(dpre + i, load(dout + i, lanes) * slope(load(pre + i, lanes)), lanes);
    });
  });
}

}  // namespace

template <class T, class W>
LinearKernels<T, W> linear_kernels() {
  return {finish<T, W>, activation_bwd<T, W>};
}
template LinearKernels<float, float> linear_kernels();
template LinearKernels<Bf16, Bf16> linear_kernels();
template LinearKernels<Bf16, float> linear_kernels();

}  // namespace mplug2::MPLUG2_ISA
