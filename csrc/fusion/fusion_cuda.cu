// fusion on a GPU: products by ATen (cuBLAS) round one pass over the scores. Scores, and backward the gradients of
// weights, are float32 and exist for as many rows at a time as stay in the second-level cache from their product to
// their pass; weights are kept whole. Rows too long for a block's shared memory, float32 and float64: the reference.
#include "core/dispatcher.h"
#include "core/elementwise.h"
#include "fusion/fusion_bwd.cuh"
#include "fusion/fusion_fwd.cuh"
#include "fusion/fusion_host.h"

namespace mplug2 {
namespace {

using namespace fusion;

const Instances kFwd{{"fusion", "fusion_fwd_bf16", MPLUG2_DIGEST(fusion)},
                     {"fusion", "fusion_fwd_fp16", MPLUG2_DIGEST(fusion)}};
const Instances kBwd{{"fusion", "fusion_bwd_bf16", MPLUG2_DIGEST(fusion)},
                     {"fusion", "fusion_bwd_fp16", MPLUG2_DIGEST(fusion)}};

// Scores at a time, for each multiprocessor: 256 KB, so that they stay in the second-level cache (27 of 40 MB on 8.0,
// 33 of 50 on 9.0) until they are read.
constexpr int64_t kScores = 64 << 10;
constexpr int64_t kTile = 128;  // rows of a product's tile

bool has_cuda_kernel(const Device& device, const Tensor& q, const Tensor& x, const FusionShape& shape,
                     int64_t shared_bytes) {
  return is_half(q) && q.numel() > 0 && x.numel() > 0 && shape.rows() * shape.batch <= INT32_MAX &&
         shared_bytes <= device.max_shared_bytes();
}

Tensor part(const Tensor& t, int64_t dim, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, dim, first, count);
}
Tensor one(const Tensor& t, int64_t dim, int64_t index) {
  Tensor whole = t;
  return torch::stable::select(whole, dim, index);
}

// Batches of matrices: transposed, and products. NOTE: rows of `out` may lie apart, and so do those of a and b here:
// cuBLAS takes the distance.
Tensor matrices_transposed(const Tensor& t) { return torch::stable::transpose(t, 1, 2); }
Tensor products(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::bmm", "", a, b); }
void products_into(const Tensor& a, const Tensor& b, const Tensor& out) { call<Tensor>("aten::bmm", "out", a, b, out); }
// In float32, which ATen has on GPUs alone.
void products_in_float_into(const Tensor& a, const Tensor& b, const Tensor& out) {
#if defined(__CUDACC__)
  call<Tensor>("aten::bmm", "dtype_out", a, b, ScalarType::Float, out);
#else
  products_into(to_dtype(a, ScalarType::Float), to_dtype(b, ScalarType::Float), out);
#endif
}

// Rows of each head, (N, B*G*S, last), of what is (..., N, last) in memory.
Tensor by_head(const Tensor& t, int64_t heads, int64_t last) {
  return torch::stable::transpose(torch::stable::reshape(t, {-1, heads, last}), 0, 1);
}

// f(first, count, scores) with scores (count, stride) = rows x^T in float32, for some of the B*R rows after others.
// rows (B, R, D), x (B, K, D).
template <class F>
void for_scores(const Device& device, const FusionShape& shape, const Tensor& rows, const Tensor& x, F f) {
  const int64_t most = device.num_multiprocessors() * kScores / shape.stride();
  const int64_t items = std::clamp<int64_t>(most / shape.rows(), 1, shape.batch);
  const int64_t step = std::min(shape.rows(), std::max(kTile, most / kTile * kTile));  // of one item
  const Tensor buffer = torch::stable::new_empty(rows, {items * step, shape.stride()}, ScalarType::Float);
  for (int64_t item = 0; item < shape.batch; item += items) {
    const int64_t num_items = std::min(items, shape.batch - item);
    const Tensor tokens = matrices_transposed(part(x, 0, item, num_items));
    for (int64_t row = 0; row < shape.rows(); row += step) {
      const int64_t num_rows = std::min(step, shape.rows() - row), count = num_items * num_rows;
      const Tensor scores = torch::stable::view(part(buffer, 0, 0, count), {num_items, num_rows, shape.stride()});
      products_in_float_into(part(part(rows, 0, item, num_items), 1, row, num_rows), tokens,
                             part(scores, 2, 0, shape.keys));
      f(item * shape.rows() + row, count, buffer);
    }
  }
}

// The mask with rows of whole chunks, 0 beyond the last key.
std::optional<Tensor> padded(const std::optional<Tensor>& mask, const FusionShape& shape) {
  if (!mask) return mask;
  const Tensor all = torch::stable::new_zeros(*mask, {shape.batch, shape.stride()});
  Tensor own = part(all, 1, 0, shape.keys);
  torch::stable::copy_(own, *mask);
  return all;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Device& device, const FusionShape& shape, const Tensor& q,
                                           const Tensor& x, const Tensor& key_weight, const Tensor& value_weight,
                                           const std::optional<Tensor>& key_mask, double scale, bool return_saved) {
  const int64_t batch = shape.batch, rows = shape.rows(), heads = shape.heads, head_dim = shape.head_dim;
  const Tensor queries = torch::stable::new_empty(q, {batch, rows, shape.width});
  products_into(by_head(q, heads, head_dim), torch::stable::reshape(key_weight, {heads, head_dim, shape.width}),
                by_head(queries, heads, shape.width));

  const Tensor weights = torch::stable::new_empty(q, {batch, rows, shape.stride()});
  const std::optional<Tensor> seen = padded(key_mask, shape);
  for_scores(device, shape, queries, x, [&](int64_t first, int64_t count, const Tensor& scores) {
    launch(device, "fusion_fwd", fwd_kernel<T>, dim3(static_cast<unsigned>(count)), kThreads,
           static_cast<int>(fwd_shared_bytes(shape.stride())),
           FwdParams<T>{device_data<float>(scores), seen ? device_data<uint8_t>(*seen) : nullptr,
                        mutable_device_data<T>(weights) + first * shape.stride(), first, static_cast<int>(rows),
                        static_cast<int>(shape.keys), static_cast<int>(shape.stride()),
                        static_cast<float>(scale * 1.4426950408889634)});
  });

  const Tensor context = products(part(weights, 2, 0, shape.keys), x), out = torch::stable::new_empty(q, q.sizes());
  products_into(by_head(context, heads, shape.width),
                matrices_transposed(torch::stable::reshape(value_weight, {heads, head_dim, shape.width})),
                by_head(out, heads, head_dim));
  const Tensor none = torch::stable::new_empty(q, {0});
  return {out, return_saved ? weights : none, return_saved ? context : none};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Device& device, const FusionShape& shape, const Tensor& dout_,
                                                    const Tensor& q_, const Tensor& x, const Tensor& key_weight_,
                                                    const Tensor& value_weight_, const Tensor& weights,
                                                    const Tensor& context, double scale) {
  const int64_t batch = shape.batch, rows = shape.rows(), heads = shape.heads, width = shape.width;
  const Tensor q = by_head(q_, heads, shape.head_dim), dout = by_head(dout_, heads, shape.head_dim);
  const Tensor key_weight = torch::stable::reshape(key_weight_, {heads, shape.head_dim, width});
  const Tensor value_weight = torch::stable::reshape(value_weight_, {heads, shape.head_dim, width});

  // Of each row the gradient of its context and its query, as wide as tokens.
  const Tensor both_rows = torch::stable::new_empty(q, {batch * shape.groups * shape.queries, heads, 2, width});
  products_into(dout, value_weight, torch::stable::transpose(one(both_rows, 2, 0), 0, 1));
  products_into(q, key_weight, torch::stable::transpose(one(both_rows, 2, 1), 0, 1));

  // Of each row its weights and the gradient of its scores.
  const Tensor both_weights = torch::stable::new_empty(q, {batch, rows, 2, shape.stride()});
  const Tensor dcontext = one(torch::stable::view(both_rows, {batch, rows, 2, width}), 2, 0);
  for_scores(device, shape, dcontext, x, [&](int64_t first, int64_t count, const Tensor& dweights) {
    launch(device, "fusion_bwd", bwd_kernel<T>, dim3(static_cast<unsigned>(count)), kThreads,
           static_cast<int>(bwd_shared_bytes(shape.stride())),
           BwdParams<T>{device_data<T>(weights) + first * shape.stride(), device_data<float>(dweights),
                        mutable_device_data<T>(both_weights) + first * 2 * shape.stride(), static_cast<int>(shape.keys),
                        static_cast<int>(shape.stride()), static_cast<float>(scale)});
  });

  // w^T dcontext + dscores^T queries is one product over twice as many rows: rounded once, written once.
  const Tensor dx =
      products(matrices_transposed(part(torch::stable::view(both_weights, {batch, 2 * rows, -1}), 2, 0, shape.keys)),
               torch::stable::view(both_rows, {batch, 2 * rows, width}));
  const Tensor dscores = part(one(both_weights, 2, 1), 2, 0, shape.keys);
  const Tensor dqueries = by_head(products(dscores, x), heads, width);
  const Tensor dq = torch::stable::new_empty(q_, q_.sizes());
  products_into(dqueries, matrices_transposed(key_weight), by_head(dq, heads, shape.head_dim));
  const auto weight_gradient = [&](const Tensor& left, const Tensor& right) {
    return torch::stable::view(products(matrices_transposed(left), right), {-1, width});
  };
  return {dq, dx, weight_gradient(q, dqueries), weight_gradient(dout, by_head(context, heads, width))};
}

std::tuple<Tensor, Tensor, Tensor> fusion_fwd(const Tensor& q, const Tensor& x, const Tensor& key_weight,
                                              const Tensor& value_weight, std::optional<Tensor> key_mask, double scale,
                                              bool return_saved) {
  const FusionShape shape = check_fusion(q, x, key_weight, value_weight, key_mask);
  const Device device(q);
  if (!has_cuda_kernel(device, q, x, shape, fwd_shared_bytes(shape.stride())) || !kFwd.serve(device, q.scalar_type()))
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::fusion_fwd_reference", "", q, x, key_weight, value_weight,
                                                    key_mask, scale, return_saved);
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, shape, q, x, key_weight, value_weight, key_mask, scale, return_saved);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fusion_bwd(const Tensor& dout, const Tensor& q, const Tensor& x,
                                                      const Tensor& key_weight, const Tensor& value_weight,
                                                      const Tensor& weights, const Tensor& context, double scale) {
  const FusionShape shape = check_fusion_bwd(dout, q, x, key_weight, value_weight, weights, context);
  const Device device(q);
  if (!has_cuda_kernel(device, q, x, shape, bwd_shared_bytes(shape.stride())) || !kBwd.serve(device, q.scalar_type()))
    return call<std::tuple<Tensor, Tensor, Tensor, Tensor>>("mplug2::fusion_bwd_reference", "", dout, q, x, key_weight,
                                                            value_weight, weights, context, scale);
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, shape, dout, q, x, key_weight, value_weight, aligned(weights), context, scale);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("fusion_fwd", TORCH_BOX(&mplug2::fusion_fwd));
  m.impl("fusion_bwd", TORCH_BOX(&mplug2::fusion_bwd));
}
