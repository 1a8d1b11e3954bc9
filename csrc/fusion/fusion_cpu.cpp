// fusion on the CPU: the reference, which is products of ATen (oneDNN) round a softmax.
#include "core/dispatcher.h"
#include "fusion/fusion_host.h"

namespace mplug2 {
namespace {

std::tuple<Tensor, Tensor, Tensor> fusion_fwd(const Tensor& q, const Tensor& x, const Tensor& key_weight,
                                              const Tensor& value_weight, std::optional<Tensor> key_mask, double scale,
                                              bool return_saved) {
  check_fusion(q, x, key_weight, value_weight, key_mask);
  return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::fusion_fwd_reference", "", q, x, key_weight, value_weight,
                                                  key_mask, scale, return_saved);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fusion_bwd(const Tensor& dout, const Tensor& q, const Tensor& x,
                                                      const Tensor& key_weight, const Tensor& value_weight,
                                                      const Tensor& weights, const Tensor& context, double scale) {
  check_fusion_bwd(dout, q, x, key_weight, value_weight, weights, context);
  return call<std::tuple<Tensor, Tensor, Tensor, Tensor>>("mplug2::fusion_bwd_reference", "", dout, q, x, key_weight,
                                                          value_weight, weights, context, scale);
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("fusion_fwd", TORCH_BOX(&mplug2::fusion_fwd));
  m.impl("fusion_bwd", TORCH_BOX(&mplug2::fusion_bwd));
}
