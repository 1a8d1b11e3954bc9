// Attention over any number of keys on a GPU: one launch, or two and a workspace where blocks share a tile's keys.
#include <algorithm>

#include "attention/attention_cuda.h"
#include "attention/attention_tiled_fwd.cuh"

namespace mplug2::attention {
namespace {

// One kernel, three names for what it does: where something else is faster for one of them, that one can be left.
const TiledInstances kForward{{{"attention", "attention_fwd_few_bf16", MPLUG2_DIGEST(attention_tiled_fwd)},
                               {"attention", "attention_fwd_few_fp16", MPLUG2_DIGEST(attention_tiled_fwd)}},
                              {{"attention", "attention_fwd_padded_bf16", MPLUG2_DIGEST(attention_tiled_fwd)},
                               {"attention", "attention_fwd_padded_fp16", MPLUG2_DIGEST(attention_tiled_fwd)}},
                              {{"attention", "attention_fwd_many_bf16", MPLUG2_DIGEST(attention_tiled_fwd)},
                               {"attention", "attention_fwd_many_fp16", MPLUG2_DIGEST(attention_tiled_fwd)}}};

struct Grid {
  int tile;           // rows
  int64_t row_tiles;  // of each head of a row of k and v
  int64_t blocks;     // without splits
};

// Few rows leave the warps the keys to share.
Grid grid_of(const AttentionShape& shape) {
  const int64_t rows = shape.total_queries();
  const int tile = rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
  const int64_t row_tiles = (rows + tile - 1) / tile;
  return {tile, row_tiles, shape.batch * shape.heads * row_tiles};
}

// Blocks that share the keys of a tile of rows. Two blocks a multiprocessor hide the latency of memory and are, with 32
// rows a warp, all that its registers hold: the fewest that keep three quarters of those places busy, from the first
// wave of blocks to the last, or else the best. A share is at least four tiles of keys: a part costs 288 bytes a row,
// written and read again, and the pipeline fills anew.
int64_t splits_of(const Device& device, int64_t blocks, int64_t keys) {
  const int64_t places = 2 * device.num_multiprocessors(), most = std::max<int64_t>(1, keys / (4 * kKeys));
  int64_t best = 1;
  double best_busy = 0;
  for (int64_t splits = 1; splits <= most && best_busy < 0.75; ++splits) {
    const int64_t waves = (blocks * splits + places - 1) / places;
    const double busy = static_cast<double>(blocks * splits) / (waves * places);
    if (busy > best_busy) {
      best = splits;
      best_busy = busy;
    }
  }
  return best;
}

// q is (B, G S, N, H) here; lengths and mask are contiguous.
template <class T>
Outputs forward(const Device& device, const Call& call, bool return_lse) {
  const AttentionShape& shape = call.shape;
  const Grid grid = grid_of(shape);
  const int64_t rows = shape.total_queries(), units = shape.batch * shape.heads;
  const int64_t splits = splits_of(device, grid.blocks, shape.keys), token = shape.heads * kHead;
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(call.q, sizes, ScalarType::Float);
  };
  const Tensor out = torch::stable::new_empty(call.q, {shape.batch * shape.groups, shape.queries, shape.heads, kHead});
  const Tensor lse = return_lse ? floats({shape.batch * shape.groups, shape.heads, shape.queries}) : floats({0});
  const Tensor parts = splits > 1 ? floats({splits, units, rows, kPartFloats}) : lse;
  const TiledFwdParams<T> params{tokens<T>(call.q),
                                 tokens<T>(call.k),
                                 tokens<T>(call.v),
                                 {mutable_device_data<T>(out), rows * token, token, kHead},
                                 return_lse ? mutable_device_data<float>(lse) : nullptr,
                                 splits > 1 ? mutable_device_data<float>(parts) : nullptr,
                                 mask_of(call),
                                 static_cast<int>(units),
                                 static_cast<int>(shape.heads),
                                 static_cast<int>(rows),
                                 static_cast<int>(grid.row_tiles),
                                 static_cast<int>(splits),
                                 static_cast<float>(call.scale) * kLog2E};

  const auto run = [&](auto layout) {
    using L = decltype(layout);
    static_assert(L::kSharedBytes <= 99 * 1024, "what every GPU has");
    launch(device, "attention_fwd_tiled", tiled_fwd_kernel<T, L>, dim3(grid.blocks, splits), kTiledFwdThreads,
           L::kSharedBytes, params);
  };
  if (grid.tile == 16) run(Layout<1, 1>{});
  if (grid.tile == 32) run(Layout<1, 2>{});
  if (grid.tile == 64) run(Layout<2, 2>{});
  if (grid.tile == 128) run(Layout<4, 2>{});
  if (splits > 1)
    launch(device, "attention_fwd_combine", combine_kernel<T>, dim3((units * rows + kCombineRows - 1) / kCombineRows),
           kTiledFwdThreads, 0, params);
  return {out, lse};
}

}  // namespace

std::optional<Outputs> tiled_forward(const Device& device, const Call& call, bool return_lse) {
  const auto& [shape, q, k, v, key_lengths, key_mask, causal, scale] = call;
  constexpr int64_t kMost = 1 << 30;  // queries of a group, or keys
  if (!call.is_for_kernels() || shape.total_queries() > kMost || shape.keys > kMost ||
      grid_of(shape).blocks > INT32_MAX || !kForward.serve(device, call))
    return std::nullopt;
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
  };
  // A group's queries follow one another as tokens do; copied where strides do not allow it.
  const Tensor grouped =
      shape.groups == 1 ? q
                        : torch::stable::reshape(q, {shape.batch, shape.total_queries(), shape.heads, shape.head_dim});
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(
      device,
      {shape, rows_of(grouped), rows_of(k), rows_of(v), contiguous(key_lengths), contiguous(key_mask), causal, scale},
      return_lse);
}

}  // namespace mplug2::attention
