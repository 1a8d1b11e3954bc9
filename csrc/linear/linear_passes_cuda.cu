// linear as ATen's product (cuBLAS) with what it adds for free, then activation and residual in one pass over it.
// Backward: one pass for dpre and dbias, then two products. Workspace: dpre, and 4 bytes x width for each row of
// blocks.
#include "core/dispatcher.h"
#include "linear/linear_bwd.cuh"
#include "linear/linear_cuda.h"
#include "linear/linear_fwd.cuh"

namespace mplug2::linear {
namespace {

const Instances kFwd{{"linear", "linear_fwd_bf16", MPLUG2_DIGEST(linear_passes)},
                     {"linear", "linear_fwd_fp16", MPLUG2_DIGEST(linear_passes)}};
const Instances kBwd{{"linear", "linear_bwd_bf16", MPLUG2_DIGEST(linear_passes)},
                     {"linear", "linear_bwd_fp16", MPLUG2_DIGEST(linear_passes)}};

// out = activation(pre) + residual; pre and out may be the same tensor.
template <class T>
void finish_rows(const Device& device, Activation activation, const Tensor& pre, const std::optional<Tensor>& residual,
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
Outputs forward(const Device& device, const Call& call) {
  const Tensor rows = as_matrix(call.x, call.depth());
  const std::optional<Tensor> residual = aligned_rows(call.residual, call.width());
  const Tensor none = torch::stable::new_empty(call.x, {0});
  const bool has_activation = call.activation != Activation::kNone;
  // The product adds to the residual's copy, and rounds once. NOTE: with a bias too it would round residual + bias in
  // between, where the residual is what must keep its digits; so the product takes the bias, and the pass the residual.
  if (residual && !call.bias && !has_activation && !call.return_pre) {
    const Tensor out = torch::stable::clone(*residual);
    linear_into(rows, call.weight, out, out);
    return {out, none};
  }
  const Tensor pre = mplug2::call<Tensor>("aten::linear", "", rows, call.weight, call.bias);
  const bool is_pre = !has_activation && !residual;
  const Tensor out = !call.return_pre ? pre : is_pre ? torch::stable::clone(pre) : torch::stable::empty_like(pre);
  if (!is_pre) finish_rows<T>(device, call.activation, pre, residual, out);
  return {out, call.return_pre ? pre : none};
}

template <class T>
Gradients backward(const Device& device, const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& pre,
                   Activation activation) {
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

}  // namespace

std::optional<Outputs> passes_forward(const Device& device, const Call& call) {
  const ScalarType dtype = call.x.scalar_type();
  if (!kFwd.serve(device, dtype)) return std::nullopt;
  return dtype == ScalarType::BFloat16 ? forward<bf16>(device, call) : forward<fp16>(device, call);
}

std::optional<Gradients> passes_backward(const Device& device, const Tensor& dout, const Tensor& x,
                                         const Tensor& weight, const Tensor& pre, Activation activation) {
  if (!kBwd.serve(device, x.scalar_type())) return std::nullopt;
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, aligned(dout), x, weight, aligned(pre), activation);
}

}  // namespace mplug2::linear
