// The forward pass of local_temporal on a GPU as two kernels: products of ours, and nothing between them but act.
#include "core/elementwise.h"
#include "local_temporal/local_temporal_cuda.h"
#include "local_temporal/local_temporal_product.cuh"

namespace mplug2::local_temporal {
namespace {

const Instances kFwd{{"local_temporal", "local_temporal_fwd_product_bf16", MPLUG2_DIGEST(local_temporal_product)},
                     {"local_temporal", "local_temporal_fwd_product_fp16", MPLUG2_DIGEST(local_temporal_product)}};

bool is_for_products(const Device& device, const Tensor& x, const LocalTemporalShape& shape) {
  return is_half(x) && x.numel() > 0 && shape.hidden > 0 && shape.width % kChunk == 0 && shape.hidden % kChunk == 0 &&
         shape.width <= kMaxProductWidth && shape.hidden <= kMaxProductWidth && shape.prefix < shape.tokens &&
         x.numel() / shape.width < 1 << 30 && kProductSharedBytes <= device.max_shared_bytes();
}

template <class T>
Outputs forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w, const LocalTemporalShape& of,
                bool return_hidden) {
  const int64_t rows = x.numel() / of.width;
  const ProductShape shape{x.size(0),
                           static_cast<int>(of.frames),
                           static_cast<int>(of.tokens),
                           static_cast<int>(of.prefix),
                           static_cast<int>(of.width),
                           static_cast<int>(of.hidden),
                           of.eps};
  const Tensor act = torch::stable::new_empty(x, {rows, of.hidden}), out = torch::stable::new_empty(x, x.sizes());
  const Tensor hidden = torch::stable::new_empty(x, {return_hidden ? rows : 0, of.hidden});
  // Blocks take all columns where they fill the GPU, so that statistics are made once a row.
  const int64_t tiles = num_tiles(shape.videos * (shape.tokens - shape.prefix), shape.frames);
  const int columns =
      tiles >= device.num_multiprocessors() ? static_cast<int>(ceil_div(of.hidden, kTileN)) * kTileN : kTileN;
  launch(device, "local_temporal_fwd_down", down_kernel<T>,
         dim3(static_cast<unsigned>(tiles * ceil_div(of.hidden, columns))), kProductThreads, kProductSharedBytes,
         DownParams<T>{device_data<T>(x), device_data<T>(w.ln_weight), device_data<T>(w.ln_bias),
                       device_data<T>(w.down_weight), device_data<T>(w.down_bias), device_data<T>(w.conv_weight),
                       device_data<T>(w.conv_bias), return_hidden ? mutable_device_data<T>(hidden) : nullptr,
                       mutable_device_data<T>(act), shape, columns});
  launch(device, "local_temporal_fwd_up", up_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(rows, kTileM) * ceil_div(of.width, kTileN))), kProductThreads,
         kProductSharedBytes,
         UpParams<T>{device_data<T>(x), device_data<T>(act), device_data<T>(w.up_weight), device_data<T>(w.up_bias),
                     mutable_device_data<T>(out), shape, rows});
  return {out, hidden};
}

}  // namespace

std::optional<Outputs> product_forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w,
                                       const LocalTemporalShape& shape, bool return_hidden) {
  if (!is_for_products(device, x, shape) || !kFwd.serve(device, x.scalar_type())) return std::nullopt;
  LocalTemporalWeights held = w;
  for (Tensor* t : {&held.ln_weight, &held.ln_bias, &held.down_weight, &held.down_bias, &held.conv_weight,
                    &held.conv_bias, &held.up_weight, &held.up_bias})
    *t = aligned(*t);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, aligned(x), held, shape, return_hidden);
}

}  // namespace mplug2::local_temporal
