// What fusion asks of its arguments.
#pragma once
#include <optional>

#include "core/check.h"

namespace mplug2 {

struct FusionShape {
  int64_t batch, groups, queries, keys, heads, head_dim, width;

  int64_t rows() const { return groups * queries * heads; }  // of scores, for each item of the batch
  int64_t stride() const { return (keys + 7) / 8 * 8; }      // from row to row of weights
};

inline FusionShape check_fusion(const Tensor& q, const Tensor& x, const Tensor& key_weight, const Tensor& value_weight,
                                const std::optional<Tensor>& key_mask) {
  constexpr const char* op = "fusion";
  check_floating(op, "q", q);
  check_shape(op, "q", q, "[B*G, S, N, H]", {-1, -1, -1, -1});
  check_shape(op, "x", x, "[B, K, D]", {-1, -1, -1});
  const int64_t batch = x.size(0), inner = q.size(2) * q.size(3);
  STD_TORCH_CHECK(batch == 0 ? q.size(0) == 0 : q.size(0) % batch == 0, op,
                  ": q must have a multiple of x's rows, B = ", batch, ", got ", q.size(0));
  check_shape(op, "key_weight", key_weight, "[N*H, D]", {inner, x.size(2)});
  check_shape(op, "value_weight", value_weight, "[N*H, D]", {inner, x.size(2)});
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"x", x}, {"key_weight", key_weight}, {"value_weight", value_weight}}) {
    check_dtype(op, name, t, q.scalar_type());
    check_device(op, name, t, q);
  }
  if (key_mask) {
    check_shape(op, "key_mask", *key_mask, "[B, K]", {batch, x.size(1)});
    STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool, op, ": key_mask must be bool, got ",
                    dtype_text(key_mask->scalar_type()));
    check_device(op, "key_mask", *key_mask, q);
  }
  return {batch, batch == 0 ? 0 : q.size(0) / batch, q.size(1), x.size(1), q.size(2), q.size(3), x.size(2)};
}

// `weights` and `context` are what the forward pass kept.
inline FusionShape check_fusion_bwd(const Tensor& dout, const Tensor& q, const Tensor& x, const Tensor& key_weight,
                                    const Tensor& value_weight, const Tensor& weights, const Tensor& context) {
  constexpr const char* op = "fusion";
  const FusionShape shape = check_fusion(q, x, key_weight, value_weight, {});
  check_shape(op, "dout", dout, "[B*G, S, N, H]", {q.size(0), q.size(1), q.size(2), q.size(3)});
  check_shape(op, "weights", weights, "[B, G*S*N, K to 8]", {shape.batch, shape.rows(), shape.stride()});
  check_shape(op, "context", context, "[B, G*S*N, D]", {shape.batch, shape.rows(), shape.width});
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>{"dout", dout}, {"weights", weights}, {"context", context}}) {
    check_dtype(op, name, t, q.scalar_type());
    check_device(op, name, t, q);
  }
  return shape;
}

}  // namespace mplug2
