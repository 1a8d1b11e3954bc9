// Attention of short rows on a GPU: no mask, one group, one launch, no workspace.
#include "attention/attention_cuda.h"
#include "attention/attention_short_fwd.cuh"

namespace mplug2::attention {
namespace {

const Instances kShort{{"attention", "attention_fwd_short_bf16", MPLUG2_DIGEST(attention_short_fwd)},
                       {"attention", "attention_fwd_short_fp16", MPLUG2_DIGEST(attention_short_fwd)}};

bool is_short(const Call& call) {
  return !call.has_mask() && call.shape.groups == 1 && call.shape.queries <= kShortRows &&
         call.shape.keys <= kShortKeys;
}

template <class T>
Outputs forward(const Device& device, const Call& call, bool return_lse) {
  const auto& [shape, q, k, v, key_lengths, key_mask, causal, scale] = call;
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse = return_lse
                         ? torch::stable::new_empty(q, {shape.batch, shape.heads, shape.queries}, ScalarType::Float)
                         : torch::stable::new_empty(q, {0}, ScalarType::Float);
  launch(device, "attention_fwd_short", short_fwd_kernel<T>, dim3(shape.batch * shape.heads), kShortFwdThreads,
         short_fwd_shared_bytes(static_cast<int>(shape.keys)),
         ShortFwdParams<T>{tokens<T>(q), tokens<T>(k), tokens<T>(v), mutable_tokens<T>(out),
                           return_lse ? mutable_device_data<float>(lse) : nullptr, static_cast<int>(shape.queries),
                           static_cast<int>(shape.keys), static_cast<int>(shape.heads),
                           static_cast<float>(scale) * kLog2E});
  return {out, lse};
}

}  // namespace

std::optional<Outputs> short_forward(const Device& device, const Call& call, bool return_lse) {
  if (!call.is_for_kernels() || !is_short(call) ||
      short_fwd_shared_bytes(static_cast<int>(call.shape.keys)) > device.max_shared_bytes() ||
      !kShort.serve(device, call.q.scalar_type()))
    return std::nullopt;
  const auto run = call.q.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, {call.shape, rows_of(call.q), rows_of(call.k), rows_of(call.v), {}, {}, false, call.scale},
             return_lse);
}

}  // namespace mplug2::attention
