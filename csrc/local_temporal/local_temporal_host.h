// What local_temporal asks of its arguments, and its parameters bundled.
#pragma once
#include "core/check.h"
#include "local_temporal/local_temporal.h"

namespace mplug2 {

struct LocalTemporalWeights {
  Tensor ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias;
};

inline LocalTemporalShape check_local_temporal(const Tensor& x, const LocalTemporalWeights& w,
                                               int64_t num_prefix_tokens, double eps) {
  constexpr const char* op = "local_temporal";
  check_floating(op, "x", x);
  check_shape(op, "x", x, "[B, T, L, D]", {-1, -1, -1, -1});
  const int64_t width = x.size(3);
  check_shape(op, "down_weight", w.down_weight, "[D/2, D]", {-1, width});
  const int64_t hidden = w.down_weight.size(0);
  check_shape(op, "ln_weight", w.ln_weight, "[D]", {width});
  check_shape(op, "ln_bias", w.ln_bias, "[D]", {width});
  check_shape(op, "down_bias", w.down_bias, "[D/2]", {hidden});
  check_shape(op, "conv_weight", w.conv_weight, "[D/2, 3]", {hidden, 3});
  check_shape(op, "conv_bias", w.conv_bias, "[D/2]", {hidden});
  check_shape(op, "up_weight", w.up_weight, "[D, D/2]", {width, hidden});
  check_shape(op, "up_bias", w.up_bias, "[D]", {width});
  const std::pair<const char*, const Tensor&> parameters[] = {
      {"ln_weight", w.ln_weight}, {"ln_bias", w.ln_bias},         {"down_weight", w.down_weight},
      {"down_bias", w.down_bias}, {"conv_weight", w.conv_weight}, {"conv_bias", w.conv_bias},
      {"up_weight", w.up_weight}, {"up_bias", w.up_bias}};
  for (const auto& [name, tensor] : parameters) {
    check_dtype(op, name, tensor, x.scalar_type());
    check_device(op, name, tensor, x);
  }
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_prefix_tokens <= x.size(2), op,
                  ": num_prefix_tokens must be in 0..L = ", x.size(2), ", got ", num_prefix_tokens);
  return {x.size(1), x.size(2), num_prefix_tokens, width, hidden, static_cast<float>(eps)};
}

inline LocalTemporalShape check_local_temporal_bwd(const Tensor& dout, const Tensor& x, const Tensor& hidden,
                                                   const LocalTemporalWeights& w, int64_t num_prefix_tokens,
                                                   double eps) {
  const LocalTemporalShape shape = check_local_temporal(x, w, num_prefix_tokens, eps);
  check_shape("local_temporal", "dout", dout, "[B, T, L, D]", {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_dtype("local_temporal", "dout", dout, x.scalar_type());
  check_device("local_temporal", "dout", dout, x);
  check_shape("local_temporal", "hidden", hidden, "[B*T*L, D/2]", {x.size(0) * x.size(1) * x.size(2), shape.hidden});
  check_dtype("local_temporal", "hidden", hidden, x.scalar_type());
  check_device("local_temporal", "hidden", hidden, x);
  return shape;
}

}  // namespace mplug2
