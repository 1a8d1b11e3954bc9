// local_temporal on a GPU: the first form that serves a call; float32, float64, empty inputs and what no form is for:
// the reference.
#include "core/dispatcher.h"
#include "local_temporal/local_temporal_cuda.h"

namespace mplug2 {
namespace {

using local_temporal::Gradients;

std::tuple<Tensor, Tensor> local_temporal_fwd(const Tensor& x, const Tensor& ln_weight, const Tensor& ln_bias,
                                              const Tensor& down_weight, const Tensor& down_bias,
                                              const Tensor& conv_weight, const Tensor& conv_bias,
                                              const Tensor& up_weight, const Tensor& up_bias, int64_t num_prefix_tokens,
                                              double eps, bool return_hidden) {
  const LocalTemporalWeights w{ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias};
  const LocalTemporalShape shape = check_local_temporal(x, w, num_prefix_tokens, eps);
  const Device device(x);
  if (auto outputs = local_temporal::product_forward(device, x, w, shape, return_hidden)) return *outputs;
  if (auto outputs = local_temporal::passes_forward(device, x, w, shape, return_hidden)) return *outputs;
  return call<std::tuple<Tensor, Tensor>>("mplug2::local_temporal_fwd_reference", "", x, ln_weight, ln_bias,
                                          down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias,
                                          num_prefix_tokens, eps, return_hidden);
}

Gradients local_temporal_bwd(const Tensor& dout, const Tensor& x, const Tensor& hidden, const Tensor& ln_weight,
                             const Tensor& ln_bias, const Tensor& down_weight, const Tensor& down_bias,
                             const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& up_weight,
                             const Tensor& up_bias, int64_t num_prefix_tokens, double eps) {
  const LocalTemporalWeights w{ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias};
  const LocalTemporalShape shape = check_local_temporal_bwd(dout, x, hidden, w, num_prefix_tokens, eps);
  const Device device(x);
  if (auto gradients = local_temporal::passes_backward(device, dout, x, hidden, w, shape)) return *gradients;
  return call<Gradients>("mplug2::local_temporal_bwd_reference", "", dout, x, hidden, ln_weight, ln_bias, down_weight,
                         down_bias, conv_weight, conv_bias, up_weight, up_bias, num_prefix_tokens, eps);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("local_temporal_fwd", TORCH_BOX(&mplug2::local_temporal_fwd));
  m.impl("local_temporal_bwd", TORCH_BOX(&mplug2::local_temporal_bwd));
}
