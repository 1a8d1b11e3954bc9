// local_temporal as ATen's products (cuBLAS), one pass of our own before and between them. The product up adds to the
// copy of x that the first pass left in out, and takes its bias as one more channel whose activation is 1: out is
// rounded once. Widths that are no multiple of 8 or beyond kMaxRowWidth are not for it.
#include "core/dispatcher.h"
#include "core/elementwise.h"
#include "local_temporal/local_temporal_cuda.h"
#include "local_temporal/local_temporal_mix.cuh"
#include "local_temporal/local_temporal_norm.cuh"

namespace mplug2::local_temporal {
namespace {

const Instances kFwd{{"local_temporal", "local_temporal_fwd_passes_bf16", MPLUG2_DIGEST(local_temporal_passes)},
                     {"local_temporal", "local_temporal_fwd_passes_fp16", MPLUG2_DIGEST(local_temporal_passes)}};
const Instances kBwd{{"local_temporal", "local_temporal_bwd_bf16", MPLUG2_DIGEST(local_temporal_passes)},
                     {"local_temporal", "local_temporal_bwd_fp16", MPLUG2_DIGEST(local_temporal_passes)}};

bool is_for_passes(const Tensor& x, const LocalTemporalShape& shape) {
  return is_half(x) && x.numel() > 0 && shape.hidden > 0 && shape.width % kChunk == 0 && shape.hidden % kChunk == 0 &&
         shape.width <= kMaxRowWidth && shape.hidden <= kMaxColumns && x.numel() / shape.width < 1 << 30;
}

MixShape mix_shape(const Tensor& x, const LocalTemporalShape& shape) {
  return {x.size(0), static_cast<int>(shape.frames), static_cast<int>(shape.tokens), static_cast<int>(shape.prefix),
          static_cast<int>(shape.hidden)};
}

// What kernels read of the parameters.
LocalTemporalWeights aligned_vectors(LocalTemporalWeights w) {
  for (Tensor* t : {&w.ln_weight, &w.ln_bias, &w.conv_weight, &w.conv_bias}) *t = aligned(*t);
  return w;
}

// up_weight with up_bias as one more column, and seven of zeros.
Tensor with_bias_column(const Tensor& up_weight, const Tensor& up_bias) {
  const int64_t width = up_weight.size(0);
  const Tensor zeros = torch::stable::new_zeros(up_weight, {width, kChunk - 1});
  const std::vector<Tensor> columns{up_weight, torch::stable::view(aligned(up_bias), {width, 1}), zeros};
  return call<Tensor>("aten::cat", "", columns, int64_t{1});
}

template <class T>
Outputs forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w, const LocalTemporalShape& shape,
                bool return_hidden) {
  const int64_t rows = x.numel() / shape.width;
  const Tensor out = torch::stable::new_empty(x, x.sizes()), normed = torch::stable::new_empty(x, {rows, shape.width});
  const NormParams<T> norm{device_data<T>(x),
                           device_data<T>(w.ln_weight),
                           device_data<T>(w.ln_bias),
                           mutable_device_data<T>(normed),
                           mutable_device_data<T>(out),
                           static_cast<int>(rows),
                           static_cast<int>(shape.width),
                           static_cast<int>(shape.tokens),
                           static_cast<int>(shape.prefix),
                           shape.eps};
  with_row_layout(shape.width, [&](auto layout) {
    using Layout = decltype(layout);
    launch(device, "local_temporal_fwd_norm", norm_kernel<T, Layout>,
           dim3(resident_blocks(device, kNormBlocks[Layout::kChunks], ceil_div(rows, Layout::kRows))), kRowThreads,
           norm_shared_bytes(norm.width), norm);
  });
  const Tensor hidden = call<Tensor>("aten::linear", "", normed, w.down_weight, std::make_optional(w.down_bias));

  const Tensor act = torch::stable::new_empty(x, {rows, shape.hidden + kChunk});
  const MixParams<T> mix{device_data<T>(hidden), device_data<T>(w.conv_weight), device_data<T>(w.conv_bias),
                         mutable_device_data<T>(act), mix_shape(x, shape)};
  const int64_t threads = mix_items(mix.shape) * (shape.hidden / kChunk + 1);
  launch(device, "local_temporal_fwd_mix", mix_kernel<T>,
         dim3(resident_blocks(device, kMixBlocks, ceil_div(threads, kMixThreads))), kMixThreads, 0, mix);
  const Tensor sum = as_matrix(out, shape.width);
  linear_into(act, with_bias_column(w.up_weight, w.up_bias), sum, sum);
  return {out, return_hidden ? hidden : torch::stable::new_empty(x, {0, shape.hidden})};
}

template <class T>
Gradients backward(const Device& device, const Tensor& dout, const Tensor& x, const Tensor& hidden,
                   const LocalTemporalWeights& w, const LocalTemporalShape& shape) {
  const int64_t rows = x.numel() / shape.width;
  const auto vector = [&](int64_t size) { return torch::stable::new_empty(x, {size}); };
  const Tensor dln_weight = vector(shape.width), dln_bias = vector(shape.width), dup_bias = vector(shape.width),
               ddown_bias = vector(shape.hidden), dconv_bias = vector(shape.hidden),
               dconv_weight = torch::stable::new_empty(x, {shape.hidden, 3});

  // act and dhidden
  const Tensor dout_rows = as_matrix(dout, shape.width), dact = product(dout_rows, w.up_weight);
  const Tensor act = torch::stable::empty_like(dact), dhidden = torch::stable::empty_like(dact);
  const MixShape mix_of = mix_shape(x, shape);
  const int64_t columns = ceil_div(shape.hidden, kWarpColumns);
  const int num_parts = std::max<int>(
      1, resident_blocks(device, kMixBwdBlocks, columns * ceil_div(mix_items(mix_of), kMixBwdWarps)) / columns);
  const Tensor mix_parts = torch::stable::new_empty(x, {num_parts, kMixSums, shape.hidden}, ScalarType::Float);
  launch(device, "local_temporal_bwd_mix", mix_bwd_kernel<T>, dim3(static_cast<unsigned>(columns), num_parts),
         kMixBwdThreads, column_sum_shared_bytes(kMixBwdWarps),
         MixBwdParams<T>{device_data<T>(hidden), device_data<T>(dact), device_data<T>(w.conv_weight),
                         device_data<T>(w.conv_bias), mutable_device_data<T>(act), mutable_device_data<T>(dhidden),
                         mutable_device_data<float>(mix_parts), mix_of});
  T* taps = mutable_device_data<T>(dconv_weight);
  sum_parts<T, kMixSums>(device, "local_temporal_bwd_mix_parts", mix_parts,
                         {{taps, 3},
                          {taps + 1, 3},
                          {taps + 2, 3},
                          {mutable_device_data<T>(dconv_bias), 1},
                          {mutable_device_data<T>(ddown_bias), 1}});
  const Tensor dup_weight = product(transposed(dout_rows), act);

  // dx, and normed in the place of its gradient
  const Tensor normed = product(dhidden, w.down_weight), dx = torch::stable::new_empty(x, x.sizes());
  with_row_layout(shape.width, [&](auto layout) {
    using Layout = decltype(layout);
    const int blocks = resident_blocks(device, kNormBwdBlocks[Layout::kChunks], ceil_div(rows, Layout::kRows));
    const Tensor parts = torch::stable::new_empty(x, {blocks, kNormSums, shape.width}, ScalarType::Float);
    launch(device, "local_temporal_bwd_norm", norm_bwd_kernel<T, Layout>, dim3(blocks), kRowThreads,
           norm_bwd_shared_bytes<Layout>(static_cast<int>(shape.width)),
           NormBwdParams<T>{device_data<T>(dout), device_data<T>(x), device_data<T>(w.ln_weight),
                            device_data<T>(w.ln_bias), mutable_device_data<T>(normed), mutable_device_data<T>(dx),
                            mutable_device_data<float>(parts), static_cast<int>(rows), static_cast<int>(shape.width),
                            static_cast<int>(shape.tokens), static_cast<int>(shape.prefix), shape.eps});
    sum_parts<T, kNormSums>(device, "local_temporal_bwd_norm_parts", parts,
                            {{mutable_device_data<T>(dln_weight), 1},
                             {mutable_device_data<T>(dln_bias), 1},
                             {mutable_device_data<T>(dup_bias), 1}});
  });
  return {dx,         dln_weight, dln_bias, product(transposed(dhidden), normed), ddown_bias, dconv_weight,
          dconv_bias, dup_weight, dup_bias};
}

}  // namespace

std::optional<Outputs> passes_forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w,
                                      const LocalTemporalShape& shape, bool return_hidden) {
  if (!is_for_passes(x, shape) || !kFwd.serve(device, x.scalar_type())) return std::nullopt;
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, aligned(x), aligned_vectors(w), shape, return_hidden);
}

std::optional<Gradients> passes_backward(const Device& device, const Tensor& dout, const Tensor& x,
                                         const Tensor& hidden, const LocalTemporalWeights& w,
                                         const LocalTemporalShape& shape) {
  if (!is_for_passes(x, shape) || !kBwd.serve(device, x.scalar_type())) return std::nullopt;
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, aligned(dout), aligned(x), aligned(hidden), aligned_vectors(w), shape);
}

}  // namespace mplug2::local_temporal
