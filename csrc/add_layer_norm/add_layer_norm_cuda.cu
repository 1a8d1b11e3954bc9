// add_layer_norm on a GPU: one launch forward, two backward. Workspace: 8 bytes x D for each block, at most kBwdBlocks
// blocks a multiprocessor. Widths that are no multiple of 8 or beyond kMaxRowWidth, float32 and float64: the reference.
#include <algorithm>

#include "add_layer_norm/add_layer_norm_bwd.cuh"
#include "add_layer_norm/add_layer_norm_fwd.cuh"
#include "add_layer_norm/add_layer_norm_host.h"
#include "core/column_sums.cuh"
#include "core/dispatcher.h"
#include "core/instance.h"

namespace mplug2 {
namespace {

using namespace add_layer_norm;

const Instance kFwdBf16{"add_layer_norm", "add_layer_norm_fwd_bf16", MPLUG2_DIGEST(add_layer_norm)};
const Instance kFwdFp16{"add_layer_norm", "add_layer_norm_fwd_fp16", MPLUG2_DIGEST(add_layer_norm)};
const Instance kBwdBf16{"add_layer_norm", "add_layer_norm_bwd_bf16", MPLUG2_DIGEST(add_layer_norm)};
const Instance kBwdFp16{"add_layer_norm", "add_layer_norm_bwd_fp16", MPLUG2_DIGEST(add_layer_norm)};

// Whether a kernel serves x: a row starts at a multiple of 16 bytes and fits the registers of its warps.
bool serves(const Instance& bf16_instance, const Instance& fp16_instance, const Device& device, const Tensor& x) {
  const int64_t width = x.size(x.dim() - 1);
  if (width % kChunk != 0 || width > kMaxRowWidth) return false;
  if (x.scalar_type() == ScalarType::BFloat16) return bf16_instance.serves(device);
  return x.scalar_type() == ScalarType::Half && fp16_instance.serves(device);
}

// Contiguous and aligned to 16 bytes: itself, or a copy.
Tensor rows_of(const Tensor& t) {
  const Tensor rows = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

// As many blocks as the device holds at once, or as there are rows for.
template <class Layout>
int num_blocks(const Device& device, int blocks_a_multiprocessor, int64_t rows) {
  const int64_t wanted = (rows + Layout::kRows - 1) / Layout::kRows;
  return static_cast<int>(std::min<int64_t>(wanted, int64_t{device.num_multiprocessors()} * blocks_a_multiprocessor));
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Device& device, const Tensor& x, const Tensor& residual, const Tensor& weight,
                                   const Tensor& bias, float eps) {
  const Tensor normed = torch::stable::new_empty(x, x.sizes()), sum = torch::stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return {normed, sum};
  const int64_t width = weight.size(0), rows = x.numel() / width;
  const FwdParams<T> params{device_data<T>(x),
                            device_data<T>(residual),
                            device_data<T>(weight),
                            device_data<T>(bias),
                            mutable_device_data<T>(normed),
                            mutable_device_data<T>(sum),
                            rows,
                            static_cast<int>(width),
                            eps};
  with_row_layout(width, [&](auto layout) {
    using Layout = decltype(layout);
    const int blocks = num_blocks<Layout>(device, kFwdBlocks[Layout::kChunks], rows);
    launch(device, "add_layer_norm_fwd", fwd_kernel<T, Layout>, dim3(blocks), kRowThreads,
           fwd_shared_bytes(params.width), params);
  });
  return {normed, sum};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Device& device, const Tensor& dnormed, const Tensor& dsum,
                                            const Tensor& sum, const Tensor& weight, float eps) {
  const Tensor dx = torch::stable::new_empty(sum, sum.sizes()), dweight = torch::stable::new_empty(sum, weight.sizes()),
               dbias = torch::stable::new_empty(sum, weight.sizes());
  const int64_t width = weight.size(0);
  if (width == 0) return {dx, dweight, dbias};
  const int64_t rows = sum.numel() / width;
  with_row_layout(width, [&](auto layout) {
    using Layout = decltype(layout);
    const int blocks = num_blocks<Layout>(device, kBwdBlocks[Layout::kChunks], rows);
    const Tensor parts = torch::stable::new_empty(sum, {blocks, 2, width}, ScalarType::Float);
    if (rows > 0)
      launch(device, "add_layer_norm_bwd_rows", bwd_kernel<T, Layout>, dim3(blocks), kRowThreads,
             bwd_shared_bytes<Layout>(static_cast<int>(width)),
             BwdParams<T>{device_data<T>(dnormed), device_data<T>(dsum), device_data<T>(sum), device_data<T>(weight),
                          mutable_device_data<T>(dx), mutable_device_data<float>(parts), rows, static_cast<int>(width),
                          eps});
    launch(device, "add_layer_norm_bwd_parts", sum_parts_kernel<T, 2>, dim3((width + kWarp - 1) / kWarp, 2),
           kSumPartsThreads, kSumPartsSharedBytes,
           SumPartsParams<T, 2>{device_data<float>(parts),
                                {{mutable_device_data<T>(dweight), 1}, {mutable_device_data<T>(dbias), 1}},
                                blocks,
                                static_cast<int>(width)});
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                              const Tensor& bias, double eps) {
  check_add_layer_norm(x, residual, weight, bias);
  const Device device(x);
  if (!serves(kFwdBf16, kFwdFp16, device, x))
    return call<std::tuple<Tensor, Tensor>>("mplug2::add_layer_norm_fwd_reference", "", x, residual, weight, bias, eps);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, rows_of(x), rows_of(residual), rows_of(weight), rows_of(bias), static_cast<float>(eps));
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_bwd(const Tensor& dnormed, const Tensor& dsum, const Tensor& sum,
                                                      const Tensor& weight, const Tensor& bias, double eps) {
  check_add_layer_norm(sum, dnormed, weight, bias);
  check_add_layer_norm(sum, dsum, weight, bias);
  const Device device(sum);
  if (!serves(kBwdBf16, kBwdFp16, device, sum))
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::add_layer_norm_bwd_reference", "", dnormed, dsum, sum,
                                                    weight, bias, eps);
  const auto run = sum.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, rows_of(dnormed), rows_of(dsum), rows_of(sum), rows_of(weight), static_cast<float>(eps));
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("add_layer_norm_fwd", TORCH_BOX(&mplug2::add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&mplug2::add_layer_norm_bwd));
}
