// What attention asks of its arguments.
#pragma once
#include <optional>
#include <utility>

#include "attention/attention.h"
#include "core/check.h"

namespace mplug2 {

inline AttentionShape check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                      const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& key_mask) {
  constexpr const char* op = "attention";
  check_floating(op, "q", q);
  check_shape(op, "q", q, "[B*G, S, N, H]", {-1, -1, -1, -1});
  check_shape(op, "k", k, "[B, K, N, H]", {-1, -1, q.size(2), q.size(3)});
  check_shape(op, "v", v, "[B, K, N, H]", {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  check_device(op, "k", k, q);
  check_device(op, "v", v, q);
  const int64_t batch = k.size(0);
  STD_TORCH_CHECK(batch == 0 ? q.size(0) == 0 : q.size(0) % batch == 0, op,
                  ": q must have a multiple of k's rows, B = ", batch, ", got ", q.size(0));
  if (key_lengths) {
    check_shape(op, "key_lengths", *key_lengths, "[B]", {batch});
    const ScalarType dtype = key_lengths->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, op,
                    ": key_lengths must be int64 or int32, got ", dtype_text(dtype));
    check_device(op, "key_lengths", *key_lengths, q);
  }
  if (key_mask) {
    check_shape(op, "key_mask", *key_mask, "[B, K]", {batch, k.size(1)});
    STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool, op, ": key_mask must be bool, got ",
                    dtype_text(key_mask->scalar_type()));
    check_device(op, "key_mask", *key_mask, q);
  }
  return {batch, batch == 0 ? 1 : q.size(0) / batch, q.size(1), k.size(1), q.size(2), q.size(3)};
}

// Of the backward pass, beside those.
inline AttentionShape check_attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out, const std::optional<Tensor>& key_lengths,
                                          const std::optional<Tensor>& key_mask) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"dout", dout}, {"out", out}}) {
    check_shape("attention", name, t, "[B*G, S, N, H]", {q.size(0), q.size(1), q.size(2), q.size(3)});
    check_dtype("attention", name, t, q.scalar_type());
    check_device("attention", name, t, q);
  }
  return shape;
}

}  // namespace mplug2
