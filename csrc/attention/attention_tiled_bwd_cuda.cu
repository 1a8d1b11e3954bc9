// Attention's backward pass over any number of queries and keys on a GPU: two launches, one for the gradients of each
// side, and one for each gradient of which blocks have parts. Workspace: 16 bytes a row and head, and such parts.
#include <algorithm>

#include "attention/attention_cuda.h"
#include "attention/attention_tiled_bwd_dkv.cuh"
#include "attention/attention_tiled_bwd_dq.cuh"

namespace mplug2::attention {
namespace {

const TiledInstances kBackward{{{"attention", "attention_bwd_few_bf16", MPLUG2_DIGEST(attention_tiled_bwd)},
                                {"attention", "attention_bwd_few_fp16", MPLUG2_DIGEST(attention_tiled_bwd)}},
                               {{"attention", "attention_bwd_padded_bf16", MPLUG2_DIGEST(attention_tiled_bwd)},
                                {"attention", "attention_bwd_padded_fp16", MPLUG2_DIGEST(attention_tiled_bwd)}},
                               {{"attention", "attention_bwd_many_bf16", MPLUG2_DIGEST(attention_tiled_bwd)},
                                {"attention", "attention_bwd_many_fp16", MPLUG2_DIGEST(attention_tiled_bwd)}}};

static_assert(std::max(kTiledDqSharedBytes, kTiledDkvSharedBytes) <= 99 * 1024, "what every GPU has");

// How the blocks of a kernel share the work: `rows` to own and `streamed` to stream by, of each unit, B N.
struct Plan {
  int sharers_log2;
  int64_t tiles, blocks, splits;  // blocks of a split

  Plan(const Device& device, int64_t units, int64_t rows, int64_t streamed)
      // Warps without rows of their own share those of others.
      : sharers_log2(rows <= kOwnRows       ? 2
                     : rows <= 2 * kOwnRows ? 1
                                            : 0),
        tiles((rows + owned_rows(1 << sharers_log2) - 1) / owned_rows(1 << sharers_log2)),
        blocks(units * tiles) {
    // As many splits as give every multiprocessor its blocks, but no split of less than four tiles.
    const int64_t wanted = int64_t{kTiledBwdBlocks} * device.num_multiprocessors() / std::max<int64_t>(blocks, 1);
    splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, streamed / (4 * kStreamRows)));
  }
};

// `to` = the sum of its parts, which begin `first` floats into each split.
template <class T>
void add_parts(const Device& device, const Tensor& parts, int64_t first, const Tokens<T>& to, int64_t units,
               int64_t heads, int64_t rows) {
  const int64_t part_rows = units * rows, chunks = part_rows * kHeadChunks;
  launch(device, "attention_bwd_tiled_parts", tiled_bwd_parts_kernel<T>,
         dim3((chunks + kTiledBwdThreads - 1) / kTiledBwdThreads), kTiledBwdThreads, 0,
         TiledBwdPartsParams<T>{device_data<float>(parts) + first, to, part_rows, parts.numel() / parts.size(0),
                                static_cast<int>(rows), static_cast<int>(heads), static_cast<int>(parts.size(0))});
}

// Tensors of queries are (B, R, N, H) here, R = G S, and the mask's are contiguous.
template <class T>
Gradients backward(const Device& device, const Call& call, const Saved& saved) {
  const AttentionShape& shape = call.shape;
  const int64_t units = shape.batch * shape.heads, rows = shape.total_queries(), keys = shape.keys;
  const Plan dq_plan(device, units, rows, keys), dkv_plan(device, units, keys, rows);
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(call.q, sizes, ScalarType::Float);
  };
  const Tensor dq = torch::stable::new_empty(call.q, {shape.batch * shape.groups, shape.queries, shape.heads, kHead});
  const Tensor dk = torch::stable::new_empty(call.k, call.k.sizes());
  const Tensor dv = torch::stable::new_empty(call.v, call.v.sizes());
  const Tensor stats = floats({units, rows, sizeof(QueryStats) / sizeof(float)});
  const Tensor dq_parts = floats({dq_plan.splits > 1 ? dq_plan.splits : 0, units, rows, kHead});
  const Tensor dkv_parts = floats({dkv_plan.splits > 1 ? dkv_plan.splits : 0, 2, units, keys, kHead});
  QueryStats* stats_data = reinterpret_cast<QueryStats*>(mutable_device_data<float>(stats));
  const float scale = static_cast<float>(call.scale), scale_log2 = scale * kLog2E;
  const int64_t token = shape.heads * kHead;

  const TiledDqParams<T> dq_params{tokens<T>(call.q),
                                   tokens<T>(saved.dout),
                                   tokens<T>(saved.out),
                                   tokens<T>(call.k),
                                   tokens<T>(call.v),
                                   {mutable_device_data<T>(dq), rows * token, token, kHead},
                                   device_data<float>(saved.lse),
                                   stats_data,
                                   dq_plan.splits > 1 ? mutable_device_data<float>(dq_parts) : nullptr,
                                   mask_of(call),
                                   static_cast<int>(units),
                                   static_cast<int>(shape.heads),
                                   static_cast<int>(rows),
                                   static_cast<int>(dq_plan.tiles),
                                   dq_plan.sharers_log2,
                                   static_cast<int>(dq_plan.splits),
                                   scale,
                                   scale_log2};
  launch(device, "attention_bwd_tiled_dq", tiled_bwd_dq_kernel<T>, dim3(dq_plan.blocks, dq_plan.splits),
         kTiledBwdThreads, kTiledDqSharedBytes, dq_params);
  if (dq_plan.splits > 1) add_parts(device, dq_parts, 0, dq_params.dq, units, shape.heads, rows);

  const TiledDkvParams<T> dkv_params{dq_params.q,
                                     dq_params.dout,
                                     dq_params.k,
                                     dq_params.v,
                                     mutable_tokens<T>(dk),
                                     mutable_tokens<T>(dv),
                                     stats_data,
                                     dkv_plan.splits > 1 ? mutable_device_data<float>(dkv_parts) : nullptr,
                                     dq_params.mask,
                                     static_cast<int>(units),
                                     static_cast<int>(shape.heads),
                                     static_cast<int>(rows),
                                     static_cast<int>(dkv_plan.tiles),
                                     dkv_plan.sharers_log2,
                                     static_cast<int>(dkv_plan.splits),
                                     scale,
                                     scale_log2};
  launch(device, "attention_bwd_tiled_dkv", tiled_bwd_dkv_kernel<T>, dim3(dkv_plan.blocks, dkv_plan.splits),
         kTiledBwdThreads, kTiledDkvSharedBytes, dkv_params);
  if (dkv_plan.splits > 1) {
    add_parts(device, dkv_parts, 0, dkv_params.dk, units, shape.heads, keys);
    add_parts(device, dkv_parts, units * keys * kHead, dkv_params.dv, units, shape.heads, keys);
  }
  return {dq, dk, dv};
}

}  // namespace

std::optional<Gradients> tiled_backward(const Device& device, const Call& call, const Saved& saved) {
  const auto& [shape, q, k, v, key_lengths, key_mask, causal, scale] = call;
  constexpr int64_t kMost = 1 << 30;                                                 // queries of a group, or keys
  const int64_t tiles = std::max(shape.total_queries(), shape.keys) / kOwnRows + 1;  // at most
  if (!call.is_for_kernels() || !saved.has_lse(call) || shape.total_queries() > kMost || shape.keys > kMost ||
      shape.batch * shape.heads > INT32_MAX / tiles || !kBackward.serve(device, call))
    return std::nullopt;
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
  };
  // A group's queries follow one another as tokens do; copied where strides do not allow it.
  const auto grouped = [&shape = shape](const Tensor& t) {
    return rows_of(shape.groups == 1
                       ? t
                       : torch::stable::reshape(t, {shape.batch, shape.total_queries(), shape.heads, shape.head_dim}));
  };
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device,
             {shape, grouped(q), rows_of(k), rows_of(v), contiguous(key_lengths), contiguous(key_mask), causal, scale},
             {grouped(saved.dout), grouped(saved.out), torch::stable::contiguous(saved.lse)});
}

}  // namespace mplug2::attention
