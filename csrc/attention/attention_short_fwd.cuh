// Attention of short rows, forward. A block is one head of one row: its keys and values lie in shared memory whole, its
// queries in registers, 32 a warp, so that a fragment of keys or values feeds two matrix instructions. What is left
// beyond a multiple of 32 (the 257th query) is one more tile of 16 rows, whose keys the warps share.
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
constexpr int kShortFwdWarps = 4, kShortFwdThreads = kShortFwdWarps * kWarp;
// 168 to 255 registers a thread: the shared memory of 257 keys lets an A100 hold two blocks, an H100 three.
constexpr int kShortFwdBlocks = 2;

constexpr int kWarpRows = 2 * kTileRows;  // of a warp at a time
constexpr int kStepTiles = 4;             // tiles of keys a step: 32 keys

// Every warp has 32 rows whose fragments the strip can share.
MPLUG2_DEVICE bool has_strip(int queries) {
  const int left = queries % kWarpRows;
  return queries >= kShortFwdWarps * kWarpRows && 0 < left && left <= kTileRows;
}

constexpr int short_fwd_shared_bytes(int keys) {
  const int tiles = 2 * padded_keys(keys) * kRowBytes, strip = kShortFwdWarps * kTileRows * kPartFloats * 4;
  return tiles > strip ? tiles : strip;
}

template <class T>
MPLUG2_KERNEL(kShortFwdThreads, kShortFwdBlocks)
short_fwd_kernel(ShortFwdParams<T> p) {
  const int64_t batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = threadIdx.x / kWarp, t = threadIdx.x % 4;
  const bool strip = has_strip(p.queries);
  const int units = strip ? p.queries / kWarpRows : (p.queries + kWarpRows - 1) / kWarpRows;  // of 32 rows
  const int strip_first = units * kWarpRows;
  const T* q = p.q.at(batch, head);
  T* out = p.out.at(batch, head);
  const auto store_lse = [&](int row, float lse) {
    if (p.lse != nullptr) p.lse[static_cast<int64_t>(blockIdx.x) * p.queries + row] = lse;
  };
  unsigned char* k_tile = shared_memory();
  unsigned char* v_tile = k_tile + padded_keys(p.keys) * kRowBytes;

  // keys, values and the first queries, once
  copy_rows<kShortFwdThreads>(k_tile, p.k.at(batch, head), p.k.token, padded_keys(p.keys), p.keys);
  copy_rows<kShortFwdThreads>(v_tile, p.v.at(batch, head), p.v.token, padded_keys(p.keys), p.keys);
  cp_async_commit();
  QueryTile rows[3];  // 32 queries, and the strip
  MPLUG2_UNROLL
  for (int r = 0; r < 2; ++r) load_rows(rows[r].q, q, p.q.token, warp * kWarpRows + r * kTileRows, p.queries);
  rows[2].clear();
  cp_async_wait<0>();
  __syncthreads();

  const auto see_all = [](int, auto&) {};
  for (int unit = warp; unit < units; unit += kShortFwdWarps) {
    rows[0].clear();
    rows[1].clear();
    // The warp's last 32 rows take its share of the strip along: every fourth step.
    const bool with_strip = strip && unit + kShortFwdWarps >= units;
    if (with_strip) load_rows(rows[2].q, q, p.q.token, strip_first, p.queries);
    int key = 0, share = kShortFwdWarps - warp;
    for (; key + kStepTiles * kTileKeys <= p.keys; key += kStepTiles * kTileKeys, ++share) {
      unsigned char *k = k_tile + key * kRowBytes, *v = v_tile + key * kRowBytes;
      if (with_strip && share % kShortFwdWarps == 0) {  // in halves: all at once spills registers
        constexpr int kHalf = kStepTiles / 2, kHalfBytes = kHalf * kTileKeys * kRowBytes;
        attend<T, kHalf, 3>(rows, k, v, p.scale_log2, see_all);
        attend<T, kHalf, 3>(rows, k + kHalfBytes, v + kHalfBytes, p.scale_log2, see_all);
      } else {
        attend<T, kStepTiles, 2>(rows, k, v, p.scale_log2, see_all);
      }
    }
    for (; key < p.keys; key += kTileKeys, ++share) {
      unsigned char *k = k_tile + key * kRowBytes, *v = v_tile + key * kRowBytes;
      const auto hide = [&](int, float (&scores)[1][4]) {
        MPLUG2_UNROLL
        for (int j = 0; j < 4; ++j)
          if (key + t * 2 + j % 2 >= p.keys) scores[0][j] = -INFINITY;
      };
      if (with_strip && share % kShortFwdWarps == 0)
        attend<T, 1, 3>(rows, k, v, p.scale_log2, hide);
      else
        attend<T, 1, 2>(rows, k, v, p.scale_log2, hide);
    }

    // out, lse; the next queries
    MPLUG2_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int first = unit * kWarpRows + r * kTileRows;
      store_queries(out, p.out.token, first, p.queries, rows[r], store_lse);
      load_rows(rows[r].q, q, p.q.token, first + kShortFwdWarps * kWarpRows, p.queries);
    }
  }
  if (!strip) return;

  // the strip: parts of all warps where keys and values were, added in the order of warps
  float* parts = reinterpret_cast<float*>(shared_memory());  // (warps, kTileRows, kPartFloats)
  __syncthreads();
  store_parts(parts + warp * kTileRows * kPartFloats, rows[2]);
  __syncthreads();
  const int row = threadIdx.x / kHeadChunks, chunk = threadIdx.x % kHeadChunks;
  if (strip_first + row >= p.queries) return;
  const MergedRow merged(parts + row * kPartFloats, kTileRows * kPartFloats, kShortFwdWarps, chunk);
  merged.store_out(out + (strip_first + row) * p.out.token + chunk * kChunk);
  if (chunk == 0) store_lse(strip_first + row, merged.lse());
}

}  // namespace mplug2::attention
