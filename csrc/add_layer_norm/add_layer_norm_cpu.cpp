// add_layer_norm on the CPU: one pass over the rows in either direction.
#define MPLUG2_ISA baseline
#include "add_layer_norm/add_layer_norm_host.h"
#include "add_layer_norm/add_layer_norm_rows.h"
#include "core/cpu.h"
#include "core/rows.h"

namespace mplug2 {
namespace {

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& residual, const Tensor& weight_, const Tensor& bias_,
                                   float eps) {
  const auto kernels = MPLUG2_KERNELS(add_layer_norm_kernels<T>());
  const Tensor weight = as_float(weight_), bias = as_float(bias_);
  Tensor normed = torch::stable::empty(x.sizes(), x.scalar_type()),
         sum = torch::stable::empty(x.sizes(), x.scalar_type());
  const int64_t width = x.size(x.dim() - 1);
  if (x.numel() == 0) return {normed, sum};
  parallel_rows(x.numel() / width, width, [&](int64_t first, int64_t last) {
    const int64_t at = first * width;
    kernels.fwd(data<T>(x) + at, data<T>(residual) + at, data<float>(weight), data<float>(bias),
                mutable_data<T>(normed) + at, mutable_data<T>(sum) + at, last - first, width, eps);
  });
  return {normed, sum};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dnormed, const Tensor& dsum, const Tensor& sum,
                                            const Tensor& weight_, float eps) {
  const auto kernels = MPLUG2_KERNELS(add_layer_norm_kernels<T>());
  const Tensor weight = as_float(weight_);
  const int64_t width = weight.size(0);
  Tensor dx = torch::stable::empty(sum.sizes(), sum.scalar_type());
  std::vector<float> dweight(kParts * width), dbias(kParts * width);
  if (sum.numel() > 0) {
    parallel_parts(sum.numel() / width, [&](int64_t part, int64_t first, int64_t last) {
      const int64_t at = first * width;
      kernels.bwd(data<T>(dnormed) + at, data<T>(dsum) + at, data<T>(sum) + at, data<float>(weight),
                  mutable_data<T>(dx) + at, &dweight[part * width], &dbias[part * width], last - first, width, eps);
    });
  }
  return {dx, sum_parts(dweight, width, weight_.scalar_type()), sum_parts(dbias, width, weight_.scalar_type())};
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              const Tensor& bias, double eps) {
  check_add_layer_norm(x, residual, weight, bias);
  if (!has_kernel(x))
    return call<std::tuple<Tensor, Tensor>>("mplug2::add_layer_norm_fwd_reference", "", x, residual, weight, bias, eps);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float> : forward<Bf16>;
  return run(torch::stable::contiguous(x), torch::stable::contiguous(residual), weight, bias, eps);
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dnormed, const Tensor& dsum, const Tensor& sum,
                                                      const Tensor& weight, const Tensor& bias, double eps) {
  check_add_layer_norm(sum, dnormed, weight, bias);
  check_add_layer_norm(sum, dsum, weight, bias);
  if (!has_kernel(sum))
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::add_layer_norm_bwd_reference", "", dnormed, dsum, sum,
                                                    weight, bias, eps);
  const auto run = sum.scalar_type() == ScalarType::Float ? backward<float> : backward<Bf16>;
  return run(torch::stable::contiguous(dnormed), torch::stable::contiguous(dsum), torch::stable::contiguous(sum),
             weight, eps);
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&mplug2::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&mplug2::add_layer_norm_bwd));
}
