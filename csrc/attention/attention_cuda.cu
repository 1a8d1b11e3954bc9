// Attention on a GPU: the first family of kernels that serves a call, else the reference, as for float32 and float64.
#include "attention/attention_cuda.h"
#include "core/dispatcher.h"

namespace mplug2 {
namespace {

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask, bool causal,
                                         double scale, bool return_lse) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  const Device device(q);
  const attention::Call call{shape, q, k, v, key_lengths, key_mask, causal, scale};
  if (call.is_for_kernels()) {
    if (auto outputs = attention::short_forward(device, call, return_lse)) return *outputs;
  }
  return mplug2::call<std::tuple<Tensor, Tensor>>("mplug2::attention_fwd_reference", "", q, k, v, key_lengths, key_mask,
                                                  causal, scale, return_lse);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) { m.impl("attention_fwd", TORCH_BOX(&mplug2::attention_fwd)); }
