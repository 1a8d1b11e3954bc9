// linear on the CPU: the product by ATen (oneDNN), then activation and residual in one pass over it.
#define MPLUG2_ISA baseline
#include "core/cpu.h"
#include "core/rows.h"
#include "linear/linear_host.h"
#include "linear/linear_rows.h"

namespace mplug2 {
namespace {

std::optional<Tensor> to_dtype(const std::optional<Tensor>& t, ScalarType dtype) {
  return t ? std::optional<Tensor>(mplug2::to_dtype(*t, dtype)) : t;
}

template <class T, class W>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   Activation activation, const std::optional<Tensor>& residual, bool return_pre) {
  const auto kernels = MPLUG2_KERNELS(linear_kernels<T, W>());
  const ScalarType dtype = Element<W>::dtype;
  const Tensor pre = call<Tensor>("aten::linear", "", mplug2::to_dtype(x, dtype), mplug2::to_dtype(weight, dtype),
                                  to_dtype(bias, dtype));
  const bool in_place = std::is_same_v<T, W> && !return_pre;
  if (in_place && activation == Activation::kNone && !residual)
    return {pre, torch::stable::empty({0}, x.scalar_type())};
  Tensor out = in_place ? pre : torch::stable::empty(pre.sizes(), x.scalar_type());
  const T* add = residual ? data<T>(*residual) : nullptr;
  torch::stable::parallel_for(0, pre.numel(), 8192, [&](int64_t first, int64_t last) {
    kernels.finish(activation, data<W>(pre) + first, add ? add + first : nullptr, mutable_data<T>(out) + first,
                   last - first);
  });
  return {out, return_pre ? mplug2::to_dtype(pre, x.scalar_type()) : torch::stable::empty({0}, x.scalar_type())};
}

// Gradients by products of W; dpre also gives the bias's.
template <class T, class W>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                            const Tensor& pre, Activation activation) {
  const auto kernels = MPLUG2_KERNELS(linear_kernels<T, W>());
  const ScalarType dtype = Element<W>::dtype, narrow = x.scalar_type();
  Tensor dpre = dout;
  if (activation != Activation::kNone) {
    dpre = torch::stable::empty(dout.sizes(), dtype);
    torch::stable::parallel_for(0, dout.numel(), 8192, [&](int64_t first, int64_t last) {
      kernels.activation_bwd(activation, data<T>(dout) + first, data<T>(pre) + first, mutable_data<W>(dpre) + first,
                             last - first);
    });
  }
  dpre = mplug2::to_dtype(torch::stable::reshape(dpre, {-1, weight.size(0)}), dtype);
  const Tensor rows = mplug2::to_dtype(torch::stable::reshape(x, {-1, weight.size(1)}), dtype);
  const Tensor dx = torch::stable::reshape(product(dpre, mplug2::to_dtype(weight, dtype)), x.sizes());
  const Tensor dweight = product(transposed(dpre), rows);
  const Tensor dbias = sum_rows(dpre, ScalarType::Float);
  return {mplug2::to_dtype(dx, narrow), mplug2::to_dtype(dweight, narrow), mplug2::to_dtype(dbias, narrow)};
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                      std::string activation, std::optional<Tensor> residual, bool return_pre) {
  const Activation kind = check_activation(activation);
  check_linear(x, weight, bias, residual);
  if (!has_kernel(x))
    return call<std::tuple<Tensor, Tensor>>("mplug2::linear_fwd_reference", "", x, weight, bias, activation, residual,
                                            return_pre);
  if (residual) residual = torch::stable::contiguous(*residual);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float, float>
                   : has_bf16_products()                ? forward<Bf16, Bf16>
                                                        : forward<Bf16, float>;
  return run(x, weight, bias, kind, residual, return_pre);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                              const Tensor& pre, std::string activation) {
  const Activation kind = check_activation(activation);
  check_linear_bwd(dout, x, weight, pre, kind);
  if (!has_kernel(x) || x.numel() == 0 || weight.numel() == 0)
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::linear_bwd_reference", "", dout, x, weight, pre,
                                                    activation);
  const auto run = x.scalar_type() == ScalarType::Float ? backward<float, float>
                   : has_bf16_products()                ? backward<Bf16, Bf16>
                                                        : backward<Bf16, float>;
  return run(torch::stable::contiguous(dout), x, weight, torch::stable::contiguous(pre), kind);
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&mplug2::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&mplug2::linear_bwd));
}
