// linear on the CPU: the product by ATen (oneDNN), then activation and residual in one pass over it; few rows by a
// kernel of ours.
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

// Up to so many rows oneDNN and MKL, made for many, take longer (docs/linear.md).
template <class W>
constexpr int64_t kMostFewRows = std::is_same_v<W, float> ? 64 : 8;

template <class T, class W>
std::tuple<Tensor, Tensor> few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                    Activation activation, const std::optional<Tensor>& residual, bool return_pre,
                                    int64_t num_rows) {
  const auto kernels = MPLUG2_KERNELS(linear_kernels<T, W>());
  const int64_t depth = weight.size(1), columns = weight.size(0);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  const Tensor out = torch::stable::empty(sizes, x.scalar_type()), rows = as_float(x);
  const Tensor pre = torch::stable::empty(return_pre ? sizes : std::vector<int64_t>{0}, x.scalar_type());
  const Tensor packed = weight.stride(1) == 1 || depth == 1 ? weight : torch::stable::contiguous(weight);
  const Tensor biases = bias ? torch::stable::contiguous(*bias) : out;
  const FewRows<T> p{data<float>(rows),
                     data<T>(packed),
                     bias ? data<T>(biases) : nullptr,
                     residual ? data<T>(*residual) : nullptr,
                     mutable_data<T>(out),
                     return_pre ? mutable_data<T>(pre) : nullptr,
                     num_rows,
                     depth,
                     columns,
                     packed.stride(0)};
  // A thread is worth waking for some 10 microseconds.
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, num_rows * depth * kFewColumns));
  torch::stable::parallel_for(0, (columns + kFewColumns - 1) / kFewColumns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      kernels.few_rows(p, activation, block * kFewColumns, std::min(columns, (block + 1) * kFewColumns));
  });
  return {out, pre};
}

template <class T, class W>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   Activation activation, const std::optional<Tensor>& residual, bool return_pre) {
  const int64_t num_rows = x.numel() / std::max<int64_t>(1, weight.size(1));
  if (num_rows <= kMostFewRows<W> && x.numel() > 0)
    return few_rows<T, W>(x, weight, bias, activation, residual, return_pre, num_rows);
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
