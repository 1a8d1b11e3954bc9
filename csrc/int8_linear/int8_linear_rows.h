// One pass before an int8 product, and one after it.
#include "int8_linear/int8_linear.h"
#include "linear/linear_activation.h"

namespace mplug2::MPLUG2_ISA {
namespace {

constexpr float kLargest = 127.0f, kZero = 128.0f;  // signed values are stored with this zero point

template <class T>
float round_row(const T* x, uint8_t* out, int64_t count) {
  Vec top{}, probe{};
  for_lanes(count, [&](int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    top = larger(v < 0.0f ? -v : v, top);
    probe += v * 0.0f;  // NaN from whatever is not finite
  });
  const float found = sum(probe), least = 1.17549435e-38f;
  const float step = largest(top) / kLargest, scale = found == found ? (step > least ? step : least) : found;
  const float inverse = 1.0f / scale;
  for_lanes(count, [&](int64_t i, auto lanes) {
    // All are positive: the conversion, which cuts, rounds.
    store_bytes(out + i, inverse * load(x + i, lanes) + (kZero + 0.5f), lanes);
  });
  return scale;
}

template <class T>
void finish_row(Activation activation, const float* product, float scale, const float* bias, const T* residual, T* out,
                int64_t count) {
  with_activation(activation, [&](auto act, auto) {
    for_lanes(count, [&](int64_t i, auto lanes) {
      Vec v = scale * load(product + i, lanes);
      if (bias != nullptr) v += load(bias + i, lanes);
      v = act(v);
      if (residual != nullptr) v += load(residual + i, lanes);
      store(out + i, v, lanes);
    });
  });
}

}  // namespace

template <class T>
Int8LinearKernels<T> int8_linear_kernels() {
  return {round_row<T>, finish_row<T>};
}
template Int8LinearKernels<float> int8_linear_kernels();
template Int8LinearKernels<Bf16> int8_linear_kernels();

}  // namespace mplug2::MPLUG2_ISA
