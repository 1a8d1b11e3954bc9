// What linear_cross_entropy asks of its arguments.
#pragma once
#include <optional>

#include "core/check.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace mplug2 {

inline LinearCrossEntropyShape check_linear_cross_entropy(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                                          const std::optional<Tensor>& bias, int64_t ignore_index,
                                                          double label_smoothing) {
  constexpr const char* op = "linear_cross_entropy";
  check_floating(op, "x", x);
  check_shape(op, "x", x, "[M, D]", {-1, -1});
  check_shape(op, "weight", weight, "[V, D]", {-1, x.size(1)});
  check_dtype(op, "weight", weight, x.scalar_type());
  check_device(op, "weight", weight, x);
  check_shape(op, "targets", targets, "[M]", {x.size(0)});
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long, op, ": targets must be int64, got ",
                  dtype_text(targets.scalar_type()));
  check_device(op, "targets", targets, x);
  if (bias) {
    check_shape(op, "bias", *bias, "[V]", {weight.size(0)});
    check_dtype(op, "bias", *bias, x.scalar_type());
    check_device(op, "bias", *bias, x);
  }
  STD_TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op, ": label_smoothing must be in 0..1, got ",
                  label_smoothing);
  return {weight.size(0), ignore_index, static_cast<float>(label_smoothing)};
}

inline LinearCrossEntropyShape check_linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& x,
                                                              const Tensor& weight, const Tensor& targets,
                                                              const std::optional<Tensor>& bias, const Tensor& lse,
                                                              int64_t ignore_index, double label_smoothing) {
  const LinearCrossEntropyShape shape =
      check_linear_cross_entropy(x, weight, targets, bias, ignore_index, label_smoothing);
  check_shape("linear_cross_entropy", "dloss", dloss, "[M]", {x.size(0)});
  check_shape("linear_cross_entropy", "lse", lse, "[M]", {x.size(0)});
  check_device("linear_cross_entropy", "dloss", dloss, x);
  check_device("linear_cross_entropy", "lse", lse, x);
  return shape;
}

// `targets` is contiguous and on the CPU.
inline void check_targets(const Tensor& targets, const LinearCrossEntropyShape& shape) {
  const int64_t* values = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t i = 0; i < targets.numel(); ++i)
    STD_TORCH_CHECK(values[i] == shape.ignore_index || (values[i] >= 0 && values[i] < shape.vocabulary),
                    "linear_cross_entropy: targets must be in 0..V-1 = ", shape.vocabulary - 1,
                    " or ignore_index = ", shape.ignore_index, ", got ", values[i], " in row ", i);
}

}  // namespace mplug2
