// What add_layer_norm asks of its arguments.
#pragma once
#include "core/check.h"

namespace mplug2 {

inline void check_add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias) {
  constexpr const char* op = "add_layer_norm";
  check_floating(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have shape [..., D], got ", shape_text(x));
  bool same = residual.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = residual.size(i) == x.size(i);
  STD_TORCH_CHECK(same, op, ": residual must have the shape of x, ", shape_text(x), ", got ", shape_text(residual));
  const int64_t width = x.size(x.dim() - 1);
  check_shape(op, "weight", weight, "[D]", {width});
  check_shape(op, "bias", bias, "[D]", {width});
  check_dtype(op, "residual", residual, x.scalar_type());
  check_dtype(op, "weight", weight, x.scalar_type());
  check_dtype(op, "bias", bias, x.scalar_type());
  check_device(op, "residual", residual, x);
  check_device(op, "weight", weight, x);
  check_device(op, "bias", bias, x);
}

}  // namespace mplug2
