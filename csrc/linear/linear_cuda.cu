// linear on a GPU: the product by ATen (cuBLAS) with what it adds for free, then activation and residual in one pass
// over it. Backward: one pass for dpre and dbias, then two products. Workspace: dpre, and 4 bytes x width for each row
// of blocks. Widths out that are no multiple of 8, float32 and float64: the reference.
#include "core/dispatcher.h"
#include "core/elementwise.h"
#include "linear/linear_bwd.cuh"
#include "linear/linear_fwd.cuh"
#include "linear/linear_host.h"

namespace mplug2 {
namespace {

using namespace linear;

const Instances kFwd{{"linear", "linear_fwd_bf16", MPLUG2_DIGEST(linear)},
                     {"linear", "linear_fwd_fp16", MPLUG2_DIGEST(linear)}};
const Instances kBwd{{"linear", "linear_bwd_bf16", MPLUG2_DIGEST(linear)},
                     {"linear", "linear_bwd_fp16", MPLUG2_DIGEST(linear)}};

// f(type) with the activation as a type.
template <class F>
void with_activation(Activation activation, F f) {
  if (activation == Activation::kGelu)
    f(Gelu{});
  else if (activation == Activation::kQuickGelu)
    f(QuickGelu{});
  else
    f(Identity{});
}

bool has_cuda_kernel(const Tensor& x, const Tensor& weight) {
  return is_half(x) && x.numel() > 0 && weight.size(0) > 0 && weight.size(0) % kChunk == 0 &&
         weight.size(0) <= kMaxColumns;
}

// out = activation(pre) + residual; pre and out may be the same tensor.
template <class T>
void finish(const Device& device, Activation activation, const Tensor& pre, const std::optional<Tensor>& residual,
            const Tensor& out) {
  const int64_t chunks = out.numel() / kChunk;
  const FwdParams<T> params{device_data<T>(pre), residual ? device_data<T>(*residual) : nullptr,
                            mutable_device_data<T>(out), chunks};
  with_activation(activation, [&](auto type) {
    launch(device, "linear_fwd", fwd_kernel<T, decltype(type)>,
           dim3(resident_blocks(device, kFwdBlocks, ceil_div(chunks, kFwdTile))), kFwdThreads, 0, params);
  });
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Device& device, const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias, Activation activation,
                                   const std::optional<Tensor>& residual, bool return_pre) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  const Tensor rows = as_matrix(x, x.size(x.dim() - 1));
  const Tensor none = torch::stable::new_empty(x, {0});
  // The product adds to the residual's copy, and rounds once. NOTE: with a bias too it would round residual + bias in
  // between, where the residual is what must keep its digits; so the product takes the bias, and the pass the residual.
  if (residual && !bias && activation == Activation::kNone && !return_pre) {
    const Tensor out = torch::stable::clone(as_matrix(*residual, shape.back()));
    linear_into(rows, weight, out, out);
    return {torch::stable::view(out, shape), none};
  }
  const Tensor pre = call<Tensor>("aten::linear", "", rows, weight, bias);
  const bool is_pre = activation == Activation::kNone && !residual;
  const Tensor out = !return_pre ? pre : is_pre ? torch::stable::clone(pre) : torch::stable::empty_like(pre);
  if (!is_pre) finish<T>(device, activation, pre, residual, out);
  return {torch::stable::view(out, shape), return_pre ? torch::stable::view(pre, shape) : none};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Device& device, const Tensor& dout, const Tensor& x,
                                            const Tensor& weight, const Tensor& pre, Activation activation) {
  const int64_t width = weight.size(0), rows = dout.numel() / width;
  const bool has_activation = activation != Activation::kNone;
  const Tensor dpre = as_matrix(has_activation ? torch::stable::empty_like(dout) : dout, width);
  const Tensor dbias = torch::stable::new_empty(weight, {width});
  const int64_t columns = ceil_div(width, kWarpColumns);
  const int parts_wanted = resident_blocks(device, kBwdBlocks, columns * ceil_div(rows, kBwdRows));
  const int num_parts = static_cast<int>(std::max<int64_t>(1, parts_wanted / columns));
  const Tensor parts = torch::stable::new_empty(dout, {num_parts, 1, width}, ScalarType::Float);
  const BwdParams<T> params{device_data<T>(dout),
                            has_activation ? device_data<T>(pre) : nullptr,
                            has_activation ? mutable_device_data<T>(dpre) : nullptr,
                            mutable_device_data<float>(parts),
                            rows,
                            static_cast<int>(width)};
  with_activation(activation, [&](auto type) {
    launch(device, "linear_bwd", bwd_kernel<T, decltype(type)>, dim3(static_cast<unsigned>(columns), num_parts),
           kBwdThreads, column_sum_shared_bytes(kBwdWarps), params);
  });
  sum_parts<T, 1>(device, "linear_bwd_parts", parts, {{mutable_device_data<T>(dbias), 1}});

  const Tensor dx = torch::stable::view(product(dpre, weight), x.sizes());
  return {dx, product(transposed(dpre), as_matrix(x, weight.size(1))), dbias};
}

std::tuple<Tensor, Tensor> linear_fwd(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                                      std::string activation, std::optional<Tensor> residual, bool return_pre) {
  const Activation kind = check_activation(activation);
  check_linear(x, weight, bias, residual);
  const Device device(x);
  if (!has_cuda_kernel(x, weight) || !kFwd.serve(device, x.scalar_type()))
    return call<std::tuple<Tensor, Tensor>>("mplug2::linear_fwd_reference", "", x, weight, bias, activation, residual,
                                            return_pre);
  if (residual) residual = aligned(*residual);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, x, weight, bias, kind, residual, return_pre);
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                              const Tensor& pre, std::string activation) {
  const Activation kind = check_activation(activation);
  check_linear_bwd(dout, x, weight, pre, kind);
  const Device device(x);
  if (!has_cuda_kernel(x, weight) || !kBwd.serve(device, x.scalar_type()))
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::linear_bwd_reference", "", dout, x, weight, pre,
                                                    activation);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, aligned(dout), x, weight, aligned(pre), kind);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("linear_fwd", TORCH_BOX(&mplug2::linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&mplug2::linear_bwd));
}
