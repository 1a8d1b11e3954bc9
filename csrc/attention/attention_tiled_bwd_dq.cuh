// Attention's tiled backward pass, dq, and what the kernel of dk and dv needs to know of every row. A block owns a tile
// of the rows that read one head of one row of k and v; its keys stream by. With a row for each query:
//   delta = dout . out, weights = 2^(scale log2(e) q k^T + shift), dscores = weights (dout v^T - delta),
//   dq = scale dscores k.
#pragma once
#include "attention/attention_tiled_bwd.cuh"

namespace mplug2::attention {

template <class T>
struct TiledDqParams {
  Tokens<const T> q, dout, out;  // (B, R, N, H), R = G S
  Tokens<const T> k, v;          // (B, K, N, H)
  Tokens<T> dq;                  // (B, R, N, H)
  const float* lse;              // (B*G, N, S)
  QueryStats* stats;             // (B*N, R)
  float* parts;                  // (splits, B*N, R, H), or null: one split
  Mask mask;
  int units, heads, rows;  // B N, N, R
  int tiles;               // of rows
  int sharers_log2, splits;
  float scale, scale_log2;  // the second times log2(e): exponentials are powers of two
};

// A stage of shared memory, from key `key` of its tile on.
struct DqStage {
  unsigned char *k, *v;
  uint32_t* seen;  // of the tile's keys, a bit each
};
constexpr int kDqStages = 3;  // tiles of keys and values in flight or in use
constexpr int kDqStageBytes = 2 * kStreamBytes + 16;
constexpr int kTiledDqSharedBytes = kDqStages * kDqStageBytes;
static_assert(kTiledDqSharedBytes >= kSumsBytes);

MPLUG2_DEVICE DqStage dq_stage(int tile, int key) {
  unsigned char* k = shared_memory() + tile % kDqStages * kDqStageBytes;
  return {k + key * kStreamRowBytes, k + kStreamBytes + key * kStreamRowBytes,
          reinterpret_cast<uint32_t*>(k + 2 * kStreamBytes)};
}

// The keys and values from `first` on into a stage, in flight; zeros for hidden ones.
template <class T>
MPLUG2_DEVICE void copy_keys(const DqStage& stage, const T* k, int64_t k_token, const T* v, int64_t v_token,
                             const SeenKeys& seen, int first) {
  const uint32_t low = seen.word(first), high = seen.word(first + 32);
  const int c = threadIdx.x % kHeadChunks;
  MPLUG2_UNROLL
  for (int i = 0; i < kStreamRows; i += kRowsAtOnce) {
    const int r = i + threadIdx.x / kHeadChunks;
    const bool is_valid = (i < 32 ? low : high) >> r % 32 & 1;
    cp_async16(stream_chunk(stage.k, r, c), k + (is_valid ? (first + r) * k_token : 0) + c * kChunk, is_valid);
    cp_async16(stream_chunk(stage.v, r, c), v + (is_valid ? (first + r) * v_token : 0) + c * kChunk, is_valid);
  }
  if (threadIdx.x == 0) *reinterpret_cast<uint2*>(stage.seen) = make_uint2(low, high);
}

// dout . out of 16 rows, by the products and in the order of dout v^T: with a single key, whose value is the output,
// their difference is exactly 0. out is b for each half of the rows, whose sums lie on the diagonal of d.
template <class T>
MPLUG2_DEVICE void row_deltas(float (&delta)[2], const uint32_t (&dout)[kHeadSteps][4],
                              const uint32_t (&out)[kHeadSteps][4]) {
  const int g = threadIdx.x % kWarp / 4;
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    MPLUG2_UNROLL
    for (int i = 0; i < kHeadSteps; ++i) mma_m16n8k16<T>(d, dout[i], out[i][half], out[i][half + 2]);
    delta[half] = __shfl_sync(0xffffffffu, g % 2 ? d[2 * half + 1] : d[2 * half], 4 * g + g / 2);
  }
}

template <class T>
MPLUG2_KERNEL(kTiledBwdThreads, kTiledBwdBlocks)
tiled_bwd_dq_kernel(TiledDqParams<T> p) {
  // Tiles of rows are neighbours in time, so that the L2 serves their keys, and the last, which see most, come first.
  const int unit = blockIdx.x / p.tiles, split = blockIdx.y, sharers = 1 << p.sharers_log2;
  const int64_t batch = unit / p.heads, head = unit % p.heads;
  const int first_row = (p.tiles - 1 - static_cast<int>(blockIdx.x) % p.tiles) * owned_rows(sharers);
  const int end_row = min(first_row + owned_rows(sharers), p.rows);
  const int warp = threadIdx.x / kWarp, share = warp & (sharers - 1), g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int warp_row = first_row + (warp >> p.sharers_log2) * kOwnRows;

  // tiles of keys that the block's rows see, and the split's share of them
  const SeenKeys seen(p.mask, batch);
  const int end = seen.end_of(QuerySpan(first_row, end_row, p.mask.queries).last);
  const int64_t tiles = tiles_of(end, kStreamRows);
  const int first_tile = tiles * split / p.splits, end_tile = tiles * (split + 1) / p.splits;
  const T *k = p.k.at(batch, head), *v = p.v.at(batch, head);
  const auto copy = [&](int tile) {
    if (tile < end_tile) copy_keys(dq_stage(tile, 0), k, p.k.token, v, p.v.token, seen, tile * kStreamRows);
    cp_async_commit();
  };
  for (int i = 0; i < kDqStages - 1; ++i) copy(first_tile + i);

  // the warp's rows: q and dout, stats, and the ends of the keys that they see
  uint32_t q[kOwnTiles][kHeadSteps][4], dout[kOwnTiles][kHeadSteps][4];
  float shift[kOwnTiles][2], delta[kOwnTiles][2];
  int row_end[kOwnTiles][2];
  MPLUG2_UNROLL
  for (int m = 0; m < kOwnTiles; ++m) {
    const int first = warp_row + m * kTileRows;
    uint32_t out[kHeadSteps][4];
    load_rows(q[m], p.q.at(batch, head), p.q.token, first, p.rows);
    load_rows(dout[m], p.dout.at(batch, head), p.dout.token, first, p.rows);
    load_rows(out, p.out.at(batch, head), p.out.token, first, p.rows);
    row_deltas<T>(delta[m], dout[m], out);
    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + g + 8 * half, group = row / p.mask.queries, query = row % p.mask.queries;
      const int64_t lse_row = (batch * (p.rows / p.mask.queries) + group) * p.heads + head;
      const float lse = row < p.rows ? p.lse[lse_row * p.mask.queries + query] : -INFINITY;
      shift[m][half] = lse == -INFINITY ? -INFINITY : -lse * kLog2E;  // sees no key: all weights are 0
      row_end[m][half] = seen.end_of(query);
      if (split == 0 && share == 0 && t == 0 && row < p.rows)
        p.stats[static_cast<int64_t>(unit) * p.rows + row] = {shift[m][half], delta[m][half], seen.lead + query, 1};
    }
  }
  // All rows of the warp see the keys before `whole_end`, none those from `warp_end` on.
  int whole_end = 0, warp_end = 0;
  if (warp_row < end_row) {
    const QuerySpan span(warp_row, min(warp_row + kOwnRows, end_row), p.mask.queries);
    whole_end = seen.end_of(span.first);
    warp_end = seen.end_of(span.last);
  }

  float dq[kOwnTiles][kHeadChunks][4] = {};
  for (int tile = first_tile; tile < end_tile; ++tile) {
    cp_async_wait<kDqStages - 2>();
    __syncthreads();
    copy(tile + kDqStages - 1);

    for (int step = share * kStepRows; step < kStreamRows; step += sharers * kStepRows) {
      constexpr uint32_t kAll = (1u << kStepRows) - 1;
      const DqStage keys = dq_stage(tile, step);
      const int first = tile * kStreamRows + step;
      const uint32_t bits = keys.seen[step / 32] >> step % 32 & kAll;
      if (first >= warp_end || bits == 0) continue;

      float s[2][kOwnTiles][4], d[2][kOwnTiles][4];
      MPLUG2_UNROLL
      for (int n = 0; n < 2; ++n) {
        multiply_rows<T>(s[n], q, keys.k + n * 8 * kStreamRowBytes);
        multiply_rows<T>(d[n], dout, keys.v + n * 8 * kStreamRowBytes);
      }
      if (first + kStepRows > whole_end || bits != kAll) {
        MPLUG2_UNROLL
        for (int m = 0; m < kOwnTiles; ++m) MPLUG2_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t row_bits = (bits & keys_before(first, row_end[m][half])) >> 2 * t;
          MPLUG2_UNROLL
          for (int n = 0; n < 2; ++n) MPLUG2_UNROLL
          for (int j = 0; j < 2; ++j)
            if (!(row_bits >> (n * 8 + j) & 1)) s[n][m][2 * half + j] = -INFINITY;
        }
      }

      // dscores, as the a of the next product: d of two tiles of 8 keys is a of 16 keys
      uint32_t dscores[kOwnTiles][4];
      MPLUG2_UNROLL
      for (int n = 0; n < 2; ++n) MPLUG2_UNROLL
      for (int m = 0; m < kOwnTiles; ++m) {
        MPLUG2_UNROLL
        for (int j = 0; j < 4; ++j)
          d[n][m][j] = exp2_approx(fmaf(s[n][m][j], p.scale_log2, shift[m][j / 2])) * (d[n][m][j] - delta[m][j / 2]);
        dscores[m][2 * n] = pack<T>(d[n][m][0], d[n][m][1]);
        dscores[m][2 * n + 1] = pack<T>(d[n][m][2], d[n][m][3]);
      }
      add_rows<T>(dq, dscores, keys.k);
    }
  }

  const int64_t part_row = (static_cast<int64_t>(split) * p.units + unit) * p.rows + first_row;
  store_sums(p.dq.at(batch, head) + first_row * p.dq.token, p.dq.token,
             p.parts == nullptr ? nullptr : p.parts + part_row * kHead, end_row - first_row, sharers, dq, p.scale,
             [](int) { return true; });
}

}  // namespace mplug2::attention
