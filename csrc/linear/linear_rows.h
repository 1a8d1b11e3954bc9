// The activation and the residual of linear in one pass over the product, a whole linear of few rows, and the
// activation's slope in the backward pass.
#include "linear/linear_activation.h"
#include "linear/linear_few_rows.h"

namespace mplug2::MPLUG2_ISA {
namespace {

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

// The weights of these columns stay in the second-level cache from one group of rows to the next.
template <class T>
void few_rows(const FewRows<T>& p, Activation activation, int64_t first, int64_t last) {
  const int64_t columns = last - first;
  const T* weight = p.weight + first * p.weight_stride;
  alignas(64) float sums[kTileRows * kFewColumns];
  const int64_t groups = (p.rows + kTileRows - 1) / kTileRows;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t row = p.rows * group / groups, count = p.rows * (group + 1) / groups - row;
    const float* x = p.x + row * p.depth;
    with_rows(count,
              [&](auto tile) { dot_rows<decltype(tile)::count>(x, weight, p.weight_stride, p.depth, columns, sums); });
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (row + r) * p.columns + first;
      with_activation(activation, [&](auto act, auto) {
        for_lanes(columns, [&](int64_t c, auto lanes) {
          Vec v = load(sums + r * kFewColumns + c, lanes);
          if (p.bias != nullptr) v += load(p.bias + first + c, lanes);
          if (p.pre != nullptr) store(p.pre + at + c, v, lanes);
          v = act(v);
          if (p.residual != nullptr) v += load(p.residual + at + c, lanes);
          store(p.out + at + c, v, lanes);
        });
      });
    }
  }
}

}  // namespace

template <class T, class W>
LinearKernels<T, W> linear_kernels() {
  return {finish<T, W>, activation_bwd<T, W>, few_rows<T>};
}
template LinearKernels<float, float> linear_kernels();
template LinearKernels<Bf16, Bf16> linear_kernels();
template LinearKernels<Bf16, float> linear_kernels();

}  // namespace mplug2::MPLUG2_ISA
