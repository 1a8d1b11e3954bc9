// Attention over any number of keys, forward (online softmax: Milakov and Gimelshein 2018; its tiles: Dao 2023). The
// G S queries that read one row of k and v are one dimension of R rows, so keys and values are read once per tile of
// rows. A block takes such a tile through its keys, 64 at a time, by cp.async; where there are too few blocks to fill
// the device, several share the keys of a tile of rows and combine_kernel puts their parts together.
#pragma once
#include "attention/attention_mask.cuh"
#include "attention/attention_query_tile.cuh"

namespace mplug2::attention {

template <class T>
struct TiledFwdParams {
  Tokens<const T> q;     // (B, R, N, H), R = G S
  Tokens<const T> k, v;  // (B, K, N, H)
  Tokens<T> out;         // (B, R, N, H)
  float* lse;            // (B G, N, S), or null
  float* parts;          // (splits, B N, R, kPartFloats); null where splits is 1
  Mask mask;
  int units, heads, rows, row_tiles;  // B N, N, R, tiles of R
  int splits;                         // blocks that share the keys of a tile of rows
  float scale_log2;                   // scale log2(e); above 0
};

constexpr int kTiledFwdWarps = 4, kTiledFwdThreads = kTiledFwdWarps * kWarp;
constexpr int kKeys = 64;                      // of a tile
constexpr int kTileBytes = kKeys * kRowBytes;  // of keys, or of values
constexpr int kStages = 3;                     // tiles of keys and values in flight or in use
constexpr int kStageBytes = 2 * kTileBytes;
constexpr int kWordBytes = kKeys / 32 * 4;  // of a tile's bits of the mask
constexpr int kStagesBytes = kStages * (kStageBytes + kWordBytes);

// How the warps share a tile: row_warps of them take other rows each, the rest other keys of the same rows. With two
// tiles of 16 queries a warp, a fragment of keys or values feeds two matrix instructions.
template <int row_warps, int query_tiles>
struct Layout {
  static constexpr int kKeyWarps = kTiledFwdWarps / row_warps, kQueryTiles = query_tiles;
  static constexpr int kWarpRows = query_tiles * kTileRows, kRows = row_warps * kWarpRows;
  static constexpr int kStepKeys = kKeyWarps == 4 ? 16 : 32;  // at a time
  static constexpr int kBlocks = query_tiles == 1 ? 4 : 2;    // a multiprocessor: 128 or 255 registers a thread
  static constexpr int kPartBytes = kKeyWarps * kRows * kPartFloats * 4;
  static constexpr int kSharedBytes = kStagesBytes > kPartBytes ? kStagesBytes : kPartBytes;
};

// `count` rows of a head from token `first` on into a tile, in flight. A tile that is not whole has fewer than kKeys
// rows, or zeros in rows that `seen`, a bit a row, lacks.
template <bool kWhole, class T>
MPLUG2_DEVICE void copy_tile(unsigned char* tile, const T* from, int64_t token, int first, int count, uint2 seen) {
  constexpr int kRowsAtOnce = kTiledFwdThreads / kHeadChunks;
  const int chunk = threadIdx.x % kHeadChunks;
  int r = threadIdx.x / kHeadChunks;
  const T* at = from + (first + r) * token + chunk * kChunk;
  MPLUG2_UNROLL
  for (int i = 0; i < kKeys / kRowsAtOnce; ++i, r += kRowsAtOnce, at += kRowsAtOnce * token) {
    const bool is_valid = kWhole || (r < count && ((r < 32 ? seen.x : seen.y) >> r % 32 & 1));
    if (kWhole || r < padded_keys(count)) cp_async16(chunk_at(tile, r, chunk), is_valid ? at : from, is_valid);
  }
}

// Sets the scores to -inf of keys that a row does not see: a tile of queries' scores of the keys from `first` on.
template <int kQueryTiles>
struct HideKeys {
  int first;
  uint32_t word;  // the mask's bits of these keys
  int whole_end;  // all rows see the keys before, but for the mask
  const int (&row_end)[kQueryTiles][2];

  template <int kTiles>
  MPLUG2_DEVICE void operator()(int r, float (&scores)[kTiles][4]) const {
    constexpr int kCount = kTiles * kTileKeys;
    if (first + kCount <= whole_end && (~word & keys_before(0, kCount)) == 0) return;
    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits = (word & keys_before(first, row_end[r][half])) >> threadIdx.x % 4 * 2;
      MPLUG2_UNROLL
      for (int n = 0; n < kTiles; ++n) MPLUG2_UNROLL
      for (int j = 0; j < 2; ++j)
        if (!(bits >> (n * kTileKeys + j) & 1)) scores[n][2 * half + j] = -INFINITY;
    }
  }
};

// Row r of unit b N + n is query r % S of row b G + r / S of q.
template <class T>
MPLUG2_DEVICE void store_lse(const TiledFwdParams<T>& p, int unit, int row, float lse) {
  if (p.lse == nullptr) return;
  const int queries = p.mask.queries, groups = p.rows / queries;
  const int64_t batch = unit / p.heads, head = unit % p.heads;
  p.lse[((batch * groups + row / queries) * p.heads + head) * queries + row % queries] = lse;
}

template <class T, class Layout>
MPLUG2_KERNEL(kTiledFwdThreads, Layout::kBlocks)
tiled_fwd_kernel(TiledFwdParams<T> p) {
  // Tiles of rows are neighbours in time, so that the L2 serves their keys, and the last, which see most, come first.
  const int unit = blockIdx.x / p.row_tiles, split = blockIdx.y;
  const int64_t batch = unit / p.heads, head = unit % p.heads;
  const int first_row = (p.row_tiles - 1 - static_cast<int>(blockIdx.x) % p.row_tiles) * Layout::kRows;
  const int num_rows = min(Layout::kRows, p.rows - first_row);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4;
  // A last tile of few rows, such as the 4,097th, leaves the warps its keys to share.
  const int key_warps = num_rows <= Layout::kWarpRows ? kTiledFwdWarps : Layout::kKeyWarps;
  const int key_warp = warp % key_warps, warp_row = warp / key_warps * Layout::kWarpRows;

  // tiles of keys that the block's rows see, and the split's share of them
  const SeenKeys seen(p.mask, batch);
  const int end = seen.end_of(QuerySpan(first_row, first_row + num_rows, p.mask.queries).last);
  const int64_t tiles = (end + kKeys - 1) / kKeys;
  const int first_tile = tiles * split / p.splits, end_tile = tiles * (split + 1) / p.splits;

  // keys and values of the first stages, then the queries
  const T *k = p.k.at(batch, head), *v = p.v.at(batch, head);
  const auto words_of = [](int stage) {
    return reinterpret_cast<uint32_t*>(shared_memory() + kStages * kStageBytes + stage * kWordBytes);
  };
  uint8_t ahead[2] = {};  // bytes of the mask, of the next tile to copy
  const auto look_at = [&](int tile) {
    MPLUG2_UNROLL
    for (int i = 0; i < 2; ++i) ahead[i] = seen.byte(tile * kKeys + 32 * i + lane);
  };
  if (seen.mask != nullptr) look_at(first_tile);
  const auto copy = [&](int tile, int stage) {
    unsigned char *k_tile = shared_memory() + stage * kStageBytes, *v_tile = k_tile + kTileBytes;
    const int first = tile * kKeys, count = min(kKeys, end - first);
    constexpr uint2 kAll{~0u, ~0u};
    uint2 words = kAll;
    if (seen.mask != nullptr) {
      words = make_uint2(__ballot_sync(~0u, ahead[0]), __ballot_sync(~0u, ahead[1]));
      if (threadIdx.x == 0) store8(words_of(stage), words);
      look_at(tile + 1);
    }
    if (count == kKeys && (words.x & words.y) == ~0u) {
      copy_tile<true>(k_tile, k, p.k.token, first, count, kAll);
      copy_tile<true>(v_tile, v, p.v.token, first, count, kAll);
    } else {  // a weight of 0 does not hide what a value may hold: it becomes 0
      copy_tile<false>(k_tile, k, p.k.token, first, count, kAll);
      copy_tile<false>(v_tile, v, p.v.token, first, count, words);
    }
  };
  for (int i = 0; i < kStages - 1; ++i) {
    if (first_tile + i < end_tile) copy(first_tile + i, i);
    cp_async_commit();
  }
  QueryTile rows[Layout::kQueryTiles];
  int row_end[Layout::kQueryTiles][2];  // rows g and g + 8 of a tile see keys before these
  MPLUG2_UNROLL
  for (int r = 0; r < Layout::kQueryTiles; ++r) {
    const int first = first_row + warp_row + r * kTileRows;
    load_rows(rows[r].q, p.q.at(batch, head), p.q.token, first, p.rows);
    rows[r].clear();
    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half)
      row_end[r][half] = seen.end_of(min(first + g + 8 * half, p.rows - 1) % p.mask.queries);
  }
  // All rows of the warp see the keys before `whole_end`, none those from `warp_end` on.
  int whole_end = 0, warp_end = 0;
  if (warp_row < num_rows) {
    const int end_row = first_row + min(warp_row + Layout::kWarpRows, num_rows);
    const QuerySpan queries(first_row + warp_row, end_row, p.mask.queries);
    whole_end = seen.end_of(queries.first);
    warp_end = seen.end_of(queries.last);
  }

  for (int tile = first_tile, stage = 0; tile < end_tile; ++tile, stage = stage + 1 < kStages ? stage + 1 : 0) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    if (tile + kStages - 1 < end_tile) copy(tile + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    cp_async_commit();

    // whole steps, then single tiles of 8 keys, the last one perhaps beyond the keys
    unsigned char *k_tile = shared_memory() + stage * kStageBytes, *v_tile = k_tile + kTileBytes;
    const int first = tile * kKeys, warp_keys = kKeys / key_warps;
    const int tile_end = min((key_warp + 1) * warp_keys, warp_end - first);
    const auto attend_to = [&](int key, auto tiles) {
      const uint32_t word = seen.mask == nullptr ? ~0u : words_of(stage)[key / 32] >> key % 32;
      attend<T, decltype(tiles)::value, Layout::kQueryTiles>(
          rows, k_tile + key * kRowBytes, v_tile + key * kRowBytes, p.scale_log2,
          HideKeys<Layout::kQueryTiles>{first + key, word, whole_end, row_end});
    };
    int key = key_warp * warp_keys;
    for (; key + Layout::kStepKeys <= tile_end; key += Layout::kStepKeys)
      attend_to(key, std::integral_constant<int, Layout::kStepKeys / kTileKeys>{});
    for (; key < tile_end; key += kTileKeys) attend_to(key, std::integral_constant<int, 1>{});
  }

  // out and lse, from registers where a warp saw all keys of its rows
  if (key_warps == 1 && p.splits == 1) {
    MPLUG2_UNROLL
    for (int r = 0; r < Layout::kQueryTiles; ++r)
      store_queries(p.out.at(batch, head), p.out.token, first_row + warp_row + r * kTileRows, p.rows, rows[r],
                    [&](int row, float lse) { store_lse(p, unit, row, lse); });
    return;
  }
  // the warps' parts, where keys and values were; together out and lse, or a part for combine_kernel
  float* parts = reinterpret_cast<float*>(shared_memory());  // (key_warps, part_rows, kPartFloats)
  const int part_rows = Layout::kRows * Layout::kKeyWarps / key_warps;
  cp_async_wait<0>();
  __syncthreads();
  MPLUG2_UNROLL
  for (int r = 0; r < Layout::kQueryTiles; ++r)
    store_parts(parts + (key_warp * part_rows + warp_row + r * kTileRows) * kPartFloats, rows[r]);
  __syncthreads();
  const int chunk = threadIdx.x % kHeadChunks;
  for (int r = threadIdx.x / kHeadChunks; r < num_rows; r += kTiledFwdThreads / kHeadChunks) {
    const MergedRow merged(parts + r * kPartFloats, part_rows * kPartFloats, key_warps, chunk);
    const int64_t row = first_row + r;
    if (p.splits > 1) {
      merged.store_part(p.parts + ((static_cast<int64_t>(split) * p.units + unit) * p.rows + row) * kPartFloats, chunk);
    } else {
      merged.store_out(p.out.at(batch, head) + row * p.out.token + chunk * kChunk);
      if (chunk == 0) store_lse(p, unit, row, merged.lse());
    }
  }
}

constexpr int kCombineRows = kTiledFwdThreads / kHeadChunks;  // of a block

// The parts of splits, in their order. A thread is a chunk of a row.
template <class T>
MPLUG2_KERNEL(kTiledFwdThreads, 4)
combine_kernel(TiledFwdParams<T> p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTiledFwdThreads + threadIdx.x,
                index = thread / kHeadChunks;
  const int64_t all_rows = static_cast<int64_t>(p.units) * p.rows;
  if (index >= all_rows) return;
  const int unit = index / p.rows, row = index % p.rows, chunk = threadIdx.x % kHeadChunks;
  const MergedRow merged(p.parts + index * kPartFloats, all_rows * kPartFloats, p.splits, chunk);
  merged.store_out(p.out.at(unit / p.heads, unit % p.heads) + row * p.out.token + chunk * kChunk);
  if (chunk == 0) store_lse(p, unit, row, merged.lse());
}

}  // namespace mplug2::attention
