// What goes round oneDNN's product in an int8 linear (python/mplug2/quantization.py), on the CPU: rows are rounded in
// one pass before it, and scaled, biased, activated and added to in one pass after it.
#define MPLUG2_ISA baseline
#include "core/cpu.h"
#include "core/rows.h"
#include "int8_linear/int8_linear_rows.h"
#include "linear/linear_host.h"

namespace mplug2 {
namespace {

constexpr const char* kOp = "int8 linear";

void check_kernel(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, kOp,
                  ": must be float32 or bfloat16, got ", dtype_text(dtype));
}

template <class T>
void round_all(const Tensor& x, const Tensor& rounded, const Tensor& scales) {
  const auto kernels = MPLUG2_KERNELS(int8_linear_kernels<T>());
  const int64_t width = x.size(1);
  parallel_rows(x.size(0), width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      mutable_data<float>(scales)[row] =
          kernels.round_row(data<T>(x) + row * width, mutable_data<uint8_t>(rounded) + row * width, width);
  });
}

std::tuple<Tensor, Tensor> round_rows(const Tensor& x) {
  check_kernel(x);
  check_shape(kOp, "x", x, "[R, D]", {-1, -1});
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor rounded = torch::stable::empty(x.sizes(), ScalarType::Byte);
  const Tensor scales = torch::stable::empty({x.size(0), 1}, ScalarType::Float);
  const auto run = x.scalar_type() == ScalarType::Float ? round_all<float> : round_all<Bf16>;
  run(rows, rounded, scales);
  return {rounded, scales};
}

template <class T>
void finish_all(const Tensor& product, const Tensor& scales, const float* bias, Activation activation,
                const std::optional<Tensor>& residual, const Tensor& out) {
  const auto kernels = MPLUG2_KERNELS(int8_linear_kernels<T>());
  const int64_t width = product.size(1);
  const T* added = residual ? data<T>(*residual) : nullptr;
  parallel_rows(product.size(0), width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels.finish_row(activation, data<float>(product) + row * width, data<float>(scales)[row], bias,
                         added ? added + row * width : nullptr, mutable_data<T>(out) + row * width, width);
  });
}

void finish(const Tensor& product, const Tensor& scales, std::optional<Tensor> bias, std::string activation,
            std::optional<Tensor> residual, Tensor out) {
  const Activation kind = check_activation(activation);
  check_kernel(out);
  check_shape(kOp, "product", product, "[R, out]", {-1, -1});
  check_shape(kOp, "scales", scales, "[R, 1]", {product.size(0), 1});
  check_shape(kOp, "out", out, "[R, out]", {product.size(0), product.size(1)});
  STD_TORCH_CHECK(product.scalar_type() == ScalarType::Float && scales.scalar_type() == ScalarType::Float, kOp,
                  ": product and scales must be float32");
  STD_TORCH_CHECK(product.is_contiguous() && scales.is_contiguous() && out.is_contiguous(), kOp,
                  ": product, scales and out must be contiguous");
  if (bias) {
    check_shape(kOp, "bias", *bias, "[out]", {product.size(1)});
    bias = as_float(*bias);
  }
  if (residual) {
    check_shape(kOp, "residual", *residual, "[R, out]", {product.size(0), product.size(1)});
    check_dtype(kOp, "residual", *residual, out.scalar_type());
    residual = torch::stable::contiguous(*residual);
  }
  const auto run = out.scalar_type() == ScalarType::Float ? finish_all<float> : finish_all<Bf16>;
  run(product, scales, bias ? data<float>(*bias) : nullptr, kind, residual, out);
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2_cpu, CPU, m) {
  m.impl("int8_round_rows", TORCH_BOX(&mplug2::round_rows));
  m.impl("int8_finish", TORCH_BOX(&mplug2::finish));
}
