// linear on a GPU: the first form that serves a call. Widths out that are no multiple of 8, float32, float64 and empty
// inputs: the reference.
#include "core/dispatcher.h"
#include "linear/linear_cuda.h"

namespace mplug2 {
namespace {

bool has_cuda_kernel(const Tensor& x, const Tensor& weight) {
  return is_half(x) && x.numel() > 0 && weight.size(0) > 0 && weight.size(0) % kChunk == 0 &&
         weight.size(0) <= kMaxColumns;
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                      std::string activation, std::optional<Tensor> residual, bool return_pre) {
  const Activation kind = check_activation(activation);
  check_linear(x, weight, bias, residual);
  const Device device(x);
  std::optional<linear::Outputs> outputs;
  if (has_cuda_kernel(x, weight)) {
    const linear::Call call{x, weight, bias, residual, kind, return_pre};
    outputs = linear::product_forward(device, call);
    if (!outputs) outputs = linear::passes_forward(device, call);
  }
  if (!outputs)
    return call<std::tuple<Tensor, Tensor>>("mplug2::linear_fwd_reference", "", x, weight, bias, activation, residual,
                                            return_pre);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  return {torch::stable::view(outputs->out, shape),
          return_pre ? torch::stable::view(outputs->pre, shape) : outputs->pre};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                              const Tensor& pre, std::string activation) {
  const Activation kind = check_activation(activation);
  check_linear_bwd(dout, x, weight, pre, kind);
  const Device device(x);
  if (has_cuda_kernel(x, weight))
    if (auto gradients = linear::passes_backward(device, dout, x, weight, pre, kind)) return *gradients;
  return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::linear_bwd_reference", "", dout, x, weight, pre, activation);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("linear_fwd", TORCH_BOX(&mplug2::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&mplug2::linear_bwd));
}
