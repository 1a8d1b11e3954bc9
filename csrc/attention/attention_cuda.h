// What the families of attention's CUDA kernels share: a call, its tensors as kernels take them, and each family's
// functions, which give nothing where the family does not serve the call (attention_cuda.cu asks them in turn).
#pragma once
#include "attention/attention_host.h"
#include "attention/attention_mask.cuh"
#include "attention/attention_tokens.cuh"
#include "core/instance.h"

namespace mplug2::attention {

// Arguments of a call, checked.
struct Call {
  AttentionShape shape;
  Tensor q, k, v;
  std::optional<Tensor> key_lengths, key_mask;
  bool causal;
  double scale;

  bool has_mask() const { return key_lengths || key_mask || causal; }
  // What every kernel asks for. A scale of 0 would make NaN of hidden scores, -inf, and a negative one turns the
  // largest score into the smallest.
  bool is_for_kernels() const {
    return (q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half) &&
           shape.head_dim == kHead && static_cast<float>(scale) * kLog2E > 0 && shape.batch * shape.heads > 0 &&
           shape.batch * shape.heads <= INT32_MAX && shape.total_queries() > 0 && shape.keys > 0;
  }
};

using Outputs = std::tuple<Tensor, Tensor>;            // out, lse
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dq, dk, dv

// What the forward pass left, and the gradient that came in. Any strides.
struct Saved {
  Tensor dout, out;  // (B*G, S, N, H)
  Tensor lse;        // (B*G, N, S) float32

  // Not where the forward pass knew that no kernel would serve.
  bool has_lse(const Call& call) const {
    if (lse.numel() == 0) return false;
    check_shape("attention", "lse", lse, "[B*G, N, S]", {call.q.size(0), call.q.size(2), call.q.size(1)});
    return true;
  }
};

// Up to 320 queries and 320 keys, no mask, one group.
std::optional<Outputs> short_forward(const Device& device, const Call& call, bool return_lse);
std::optional<Gradients> short_backward(const Device& device, const Call& call, const Saved& saved);
// Any number of queries, keys and groups, key_lengths, key_mask, causal.
std::optional<Outputs> tiled_forward(const Device& device, const Call& call, bool return_lse);
std::optional<Gradients> tiled_backward(const Device& device, const Call& call, const Saved& saved);

// Of the tiled kernels, by what a call is: few queries, hidden keys by a length or a mask, all else.
struct TiledInstances {
  Instances few, padded, many;
  bool serve(const Device& device, const Call& call) const {
    const bool is_padded = call.key_lengths || call.key_mask, is_few = call.shape.total_queries() <= 64;
    return (is_padded ? padded : is_few ? few : many).serve(device, call.q.scalar_type());
  }
};

// Rows that start at multiples of 16 bytes, whatever the strides of the other dimensions: itself, or a copy.
inline Tensor rows_of(const Tensor& t) {
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) % kChunk == 0);
  if (aligned) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// Lengths and mask of the call, contiguous, as kernels take them.
inline Mask mask_of(const Call& call) {
  const auto& lengths = call.key_lengths;
  const bool is_wide = lengths && lengths->scalar_type() == ScalarType::Long;
  const void* data = !lengths  ? nullptr
                     : is_wide ? static_cast<const void*>(device_data<int64_t>(*lengths))
                               : device_data<int32_t>(*lengths);
  return {data,
          call.key_mask ? device_data<bool>(*call.key_mask) : nullptr,
          static_cast<int>(call.shape.queries),
          static_cast<int>(call.shape.keys),
          is_wide,
          call.causal};
}

template <class T>
Tokens<const T> tokens(const Tensor& t) {
  return {device_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Tokens<T> mutable_tokens(const Tensor& t) {
  return {mutable_device_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

}  // namespace mplug2::attention
