// What linear asks of its arguments.
#pragma once
#include <optional>

#include "core/check.h"
#include "linear/linear.h"

namespace mplug2 {

inline Activation check_activation(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  STD_TORCH_CHECK(false, "linear: activation must be \"none\", \"gelu\" or \"quick_gelu\", got \"", name, "\"");
}

inline void check_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& residual) {
  constexpr const char* op = "linear";
  check_floating(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have shape [..., D], got ", shape_text(x));
  check_shape(op, "weight", weight, "[out, D]", {-1, x.size(x.dim() - 1)});
  check_dtype(op, "weight", weight, x.scalar_type());
  check_device(op, "weight", weight, x);
  if (bias) {
    check_shape(op, "bias", *bias, "[out]", {weight.size(0)});
    check_dtype(op, "bias", *bias, x.scalar_type());
    check_device(op, "bias", *bias, x);
  }
  if (residual) {
    bool same = residual->dim() == x.dim() && residual->size(x.dim() - 1) == weight.size(0);
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
    STD_TORCH_CHECK(same, op, ": residual must have the shape of the output, that of x ", shape_text(x),
                    " with the last size ", weight.size(0), ", got ", shape_text(*residual));
    check_dtype(op, "residual", *residual, x.scalar_type());
    check_device(op, "residual", *residual, x);
  }
}

// The gradient of the output, and what the forward pass kept for it: the slope of an activation is taken at pre.
inline void check_linear_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& pre,
                             Activation activation) {
  check_linear(x, weight, std::nullopt, dout);
  if (activation == Activation::kNone) return;
  bool same = pre.dim() == dout.dim();
  for (int64_t i = 0; same && i < dout.dim(); ++i) same = pre.size(i) == dout.size(i);
  STD_TORCH_CHECK(same, "linear: pre must have the shape of dout, ", shape_text(dout), ", got ", shape_text(pre));
  check_dtype("linear", "pre", pre, x.scalar_type());
  check_device("linear", "pre", pre, x);
}

}  // namespace mplug2
