// Passes round products, launched without their products, which would fill gigabytes: for tensors of more than 2^31
// elements, of which tests run a block (emulated.blocks). One turn of a block's loop: grids are as large as the work.
#include "core/elementwise.h"
#include "linear/linear_bwd.cuh"
#include "linear/linear_cuda.h"
#include "linear/linear_fwd.cuh"
#include "linear_cross_entropy/linear_cross_entropy_bwd.cuh"
#include "linear_cross_entropy/linear_cross_entropy_fwd.cuh"

namespace mplug2 {
namespace {

using T = bf16;

void linear_fwd_pass(Tensor pre, Tensor residual, Tensor out) {
  const Device device(pre);
  const int64_t chunks = pre.numel() / kChunk;
  launch(device, "linear_fwd", linear::fwd_kernel<T, QuickGelu>,
         dim3(static_cast<unsigned>(ceil_div(chunks, linear::kFwdTile))), linear::kFwdThreads, 0,
         linear::FwdParams<T>{device_data<T>(pre), device_data<T>(residual), mutable_device_data<T>(out), chunks});
}

// parts (blocks of 16 rows, width)
void linear_bwd_pass(Tensor dout, Tensor pre, Tensor dpre, Tensor parts) {
  const Device device(dout);
  const int64_t rows = dout.size(0), width = dout.size(1);
  launch(device, "linear_bwd", linear::bwd_kernel<T, QuickGelu>,
         dim3(static_cast<unsigned>(ceil_div(width, kWarpColumns)),
              static_cast<unsigned>(ceil_div(rows, linear::kBwdRows))),
         linear::kBwdThreads, column_sum_shared_bytes(linear::kBwdWarps),
         linear::BwdParams<T>{device_data<T>(dout), device_data<T>(pre), mutable_device_data<T>(dpre),
                              mutable_device_data<float>(parts), rows, static_cast<int>(width)});
}

void linear_cross_entropy_fwd_pass(Tensor logits, Tensor targets, Tensor loss, Tensor lse) {
  using namespace linear_cross_entropy;
  const Device device(logits);
  launch(device, "linear_cross_entropy_fwd", fwd_kernel<T>, dim3(static_cast<unsigned>(logits.size(0))), kFwdThreads,
         kFwdSharedBytes,
         FwdParams<T>{device_data<T>(logits), nullptr, device_data<int64_t>(targets), mutable_device_data<float>(loss),
                      mutable_device_data<float>(lse), static_cast<int>(logits.size(1)), logits.size(1), -100, 0.1f});
}

// parts (blocks of 32 rows, vocabulary)
void linear_cross_entropy_bwd_pass(Tensor logits, Tensor targets, Tensor dloss, Tensor lse, Tensor parts) {
  using namespace linear_cross_entropy;
  const Device device(logits);
  const int64_t rows = logits.size(0), width = logits.size(1);
  launch(device, "linear_cross_entropy_bwd", bwd_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(width, kWarpColumns)), static_cast<unsigned>(ceil_div(rows, kBwdRows))),
         kBwdThreads, column_sum_shared_bytes(kBwdWarps),
         BwdParams<T>{mutable_device_data<T>(logits), nullptr, device_data<int64_t>(targets), device_data<float>(dloss),
                      device_data<float>(lse), mutable_device_data<float>(parts), rows, 0, static_cast<int>(width),
                      width, width, static_cast<int>(width), -100, 0.1f});
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_FRAGMENT(mplug2_samples, m) {
  m.def("linear_fwd_pass(Tensor pre, Tensor residual, Tensor(a!) out) -> ()");
  m.def("linear_bwd_pass(Tensor dout, Tensor pre, Tensor(a!) dpre, Tensor(b!) parts) -> ()");
  m.def("linear_cross_entropy_fwd_pass(Tensor logits, Tensor targets, Tensor(a!) loss, Tensor(b!) lse) -> ()");
  m.def(
      "linear_cross_entropy_bwd_pass(Tensor(a!) logits, Tensor targets, Tensor dloss, Tensor lse, Tensor(b!) parts) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mplug2_samples, CPU, m) {
  m.impl("linear_fwd_pass", TORCH_BOX(&mplug2::linear_fwd_pass));
  m.impl("linear_bwd_pass", TORCH_BOX(&mplug2::linear_bwd_pass));
  m.impl("linear_cross_entropy_fwd_pass", TORCH_BOX(&mplug2::linear_cross_entropy_fwd_pass));
  m.impl("linear_cross_entropy_bwd_pass", TORCH_BOX(&mplug2::linear_cross_entropy_bwd_pass));
}
