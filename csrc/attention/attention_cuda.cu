// Attention on a GPU: short rows without a mask by one launch forward, no workspace. All else, and float32 and float64,
// by the reference.
#include "attention/attention_host.h"
#include "attention/attention_short_fwd.cuh"
#include "core/dispatcher.h"
#include "core/instance.h"

namespace mplug2 {
namespace {

using namespace attention;

const Instance kFwdShortBf16{"attention", "attention_fwd_short_bf16", MPLUG2_DIGEST(attention)};
const Instance kFwdShortFp16{"attention", "attention_fwd_short_fp16", MPLUG2_DIGEST(attention)};

// Rows that start at multiples of 16 bytes, whatever the strides of the other dimensions: itself, or a copy.
Tensor rows_of(const Tensor& t) {
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) % kChunk == 0);
  if (aligned) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

template <class T>
Tokens<const T> tokens(const Tensor& t) {
  return {device_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Tokens<T> mutable_tokens(const Tensor& t) {
  return {mutable_device_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// Whether the kernels of short rows can serve a call, their shared memory aside. A scale of 0 would make NaN of hidden
// scores, -inf, and a negative one turns the largest score into the smallest.
bool is_short(const AttentionShape& shape, const std::optional<Tensor>& key_lengths,
              const std::optional<Tensor>& key_mask, bool causal, double scale) {
  return !key_lengths && !key_mask && !causal && static_cast<float>(scale) * kLog2E > 0 && shape.groups == 1 &&
         shape.head_dim == kHead && shape.batch * shape.heads > 0 && shape.batch * shape.heads <= INT32_MAX &&
         shape.queries > 0 && shape.queries <= kShortRows && shape.keys > 0 && shape.keys <= kShortKeys;
}

bool serves(const Instance& bf16_instance, const Instance& fp16_instance, const Device& device, const Tensor& q) {
  if (q.scalar_type() == ScalarType::BFloat16) return bf16_instance.serves(device);
  return q.scalar_type() == ScalarType::Half && fp16_instance.serves(device);
}

template <class T>
std::tuple<Tensor, Tensor> short_forward(const Device& device, const AttentionShape& shape, const Tensor& q,
                                         const Tensor& k, const Tensor& v, double scale, bool return_lse) {
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

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask, bool causal,
                                         double scale, bool return_lse) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  const Device device(q);
  if (!is_short(shape, key_lengths, key_mask, causal, scale) ||
      short_fwd_shared_bytes(static_cast<int>(shape.keys)) > device.max_shared_bytes() ||
      !serves(kFwdShortBf16, kFwdShortFp16, device, q))
    return call<std::tuple<Tensor, Tensor>>("mplug2::attention_fwd_reference", "", q, k, v, key_lengths, key_mask,
                                            causal, scale, return_lse);
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? short_forward<bf16> : short_forward<fp16>;
  return run(device, shape, rows_of(q), rows_of(k), rows_of(v), scale, return_lse);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) { m.impl("attention_fwd", TORCH_BOX(&mplug2::attention_fwd)); }
