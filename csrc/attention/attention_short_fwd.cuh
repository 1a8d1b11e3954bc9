// Attention of short rows, forward. A block is one head of one row: its keys and values lie in shared memory whole, its
// queries in registers, 16 a warp at a time. A last tile of queries that would keep seven of eight warps waiting (the
// 257th query) is shared: each warp takes an eighth of its keys.
#pragma once
#include "attention/attention_query_tile.cuh"

namespace mplug2::attention {

template <class T>
struct ShortFwdParams {
  Tokens<const T> q;     // (B, S, N, H)
  Tokens<const T> k, v;  // (B, K, N, H)
  Tokens<T> out;         // (B, S, N, H)
  float* lse;            // (B, N, S), or null
  int queries, keys, heads;
  float scale_log2;  // scale log2(e): exponentials are powers of two; above 0
};

constexpr int kShortKeys = 320, kShortRows = 320;  // K and S at most
// 16 warps a multiprocessor at 128 registers. With 32 queries a warp a fragment would feed two matrix instructions, but
// 249 registers leave 8 warps, too few to hide latency: 753 us instead of 627 on an H100 (docs/attention_gpu.md).
constexpr int kShortFwdWarps = 8, kShortFwdThreads = kShortFwdWarps * kWarp, kShortFwdBlocks = 2;
constexpr int kStepTiles = 4;  // tiles of keys a step: 32 keys

constexpr int short_fwd_shared_bytes(int keys) {
  const int tiles = 2 * padded_keys(keys) * kRowBytes, parts = kShortFwdWarps * kTileRows * kPartFloats * 4;
  return tiles > parts ? tiles : parts;
}

struct HideNone {
  template <int kTiles>
  MPLUG2_DEVICE void operator()(int, float (&)[kTiles][4]) const {}
};
// Of a tile of keys those from `seen` on.
struct HideFrom {
  int seen;
  MPLUG2_DEVICE void operator()(int, float (&scores)[1][4]) const {
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j)
      if (static_cast<int>(threadIdx.x % 4 * 2 + j % 2) >= seen) scores[0][j] = -INFINITY;
  }
};

// The tiles of keys [first, end): whole steps, then single tiles, the last one perhaps beyond the keys.
template <class T>
MPLUG2_DEVICE void attend_to_tiles(QueryTile (&rows)[1], unsigned char* k, unsigned char* v, int first, int end,
                                   const ShortFwdParams<T>& p) {
  const int end_of_steps = min(end, p.keys / kTileKeys) - kStepTiles;
  for (; first <= end_of_steps; first += kStepTiles) {
    const int at = first * kTileKeys * kRowBytes;
    attend<T, kStepTiles, 1>(rows, k + at, v + at, p.scale_log2, HideNone{});
  }
  for (; first < end; ++first) {
    const int at = first * kTileKeys * kRowBytes;
    attend<T, 1, 1>(rows, k + at, v + at, p.scale_log2, HideFrom{p.keys - first * kTileKeys});
  }
}

template <class T>
MPLUG2_KERNEL(kShortFwdThreads, kShortFwdBlocks)
short_fwd_kernel(ShortFwdParams<T> p) {
  const int batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = threadIdx.x / kWarp;
  const int tiles = (p.queries + kTileRows - 1) / kTileRows, key_tiles = (p.keys + kTileKeys - 1) / kTileKeys;
  const bool is_last_shared = tiles > kShortFwdWarps && tiles % kShortFwdWarps == 1;
  const int own_tiles = is_last_shared ? tiles - 1 : tiles;  // of queries, of one warp each
  const auto store_lse = [&](int row, float lse) {
    if (p.lse != nullptr) p.lse[static_cast<int64_t>(blockIdx.x) * p.queries + row] = lse;
  };
  unsigned char *k = shared_memory(), *v = k + key_tiles * kTileKeys * kRowBytes;

  // keys, values and the first queries, once
  copy_rows<kShortFwdThreads>(k, p.k.at(batch, head), p.k.token, key_tiles * kTileKeys, p.keys);
  copy_rows<kShortFwdThreads>(v, p.v.at(batch, head), p.v.token, key_tiles * kTileKeys, p.keys);
  cp_async_commit();
  QueryTile rows[1];
  load_rows(rows[0].q, p.q.at(batch, head), p.q.token, warp * kTileRows, p.queries);
  cp_async_wait<0>();
  __syncthreads();

  for (int tile = warp; tile < own_tiles; tile += kShortFwdWarps) {
    rows[0].clear();
    attend_to_tiles(rows, k, v, 0, key_tiles, p);

    // out, lse; the next queries
    store_queries(p.out.at(batch, head), p.out.token, tile * kTileRows, p.queries, rows[0], store_lse);
    load_rows(rows[0].q, p.q.at(batch, head), p.q.token, min(tile + kShortFwdWarps, tiles - 1) * kTileRows, p.queries);
  }
  if (!is_last_shared) return;

  // the shared tile: parts of all warps where keys and values were, added in the order of warps
  rows[0].clear();
  attend_to_tiles(rows, k, v, warp * key_tiles / kShortFwdWarps, (warp + 1) * key_tiles / kShortFwdWarps, p);
  float* parts = reinterpret_cast<float*>(shared_memory());  // (warps, kTileRows, kPartFloats)
  __syncthreads();
  store_parts(parts + warp * kTileRows * kPartFloats, rows[0]);
  __syncthreads();
  const int row = threadIdx.x / kHeadChunks, chunk = threadIdx.x % kHeadChunks, at = own_tiles * kTileRows + row;
  if (row >= kTileRows || at >= p.queries) return;
  const MergedRow merged(parts + row * kPartFloats, kTileRows * kPartFloats, kShortFwdWarps, chunk);
  merged.store_out(p.out.at(batch, head) + at * p.out.token + chunk * kChunk);
  if (chunk == 0) store_lse(at, merged.lse());
}

}  // namespace mplug2::attention
