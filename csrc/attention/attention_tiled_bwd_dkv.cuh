// Attention's tiled backward pass, dk and dv. A block owns a tile of keys of one head; the rows that read them, the
// queries of all groups, stream by. With a row for each key and a column for each query:
//   weights = 2^(scale log2(e) k q^T + shift), dscores = weights (v dout^T - delta),
//   dv = weights dout, dk = scale dscores q.
#pragma once
#include "attention/attention_tiled_bwd.cuh"

namespace mplug2::attention {

template <class T>
struct TiledDkvParams {
  Tokens<const T> q, dout;  // (B, R, N, H), R = G S
  Tokens<const T> k, v;     // (B, K, N, H)
  Tokens<T> dk, dv;         // (B, K, N, H)
  const QueryStats* stats;  // (B*N, R)
  float* parts;             // (splits, 2, B*N, K, H), or null: one split
  Mask mask;
  int units, heads, rows;  // B N, N, R
  int tiles;               // of keys
  int sharers_log2, splits;
  float scale, scale_log2;  // the second times log2(e): exponentials are powers of two
};

// What is the same for the whole block, in shared memory: registers are for sums.
template <class T>
struct DkvBlock {
  const T *q, *dout;
  const QueryStats* stats;
  int64_t batch, head;
  SeenKeys seen;
  int first_key, end_tile;  // end_tile: of the split's tiles of rows

  MPLUG2_DEVICE explicit DkvBlock(const TiledDkvParams<T>& p)
      : batch(blockIdx.x / p.tiles / p.heads),
        head(blockIdx.x / p.tiles % p.heads),
        seen(p.mask, batch),
        first_key(blockIdx.x % p.tiles * owned_rows(1 << p.sharers_log2)) {
    q = p.q.at(batch, head);
    dout = p.dout.at(batch, head);
    stats = p.stats + (batch * p.heads + head) * p.rows;
    const int64_t row_tiles = tiles_of(p.rows, kStreamRows);
    end_tile = first_key < seen.end ? row_tiles * (blockIdx.y + 1) / p.splits : 0;
  }
};

// A stage of shared memory, from row `row` of its tile on.
struct DkvStage {
  unsigned char *q, *dout;
  QueryStats* stats;
};
constexpr int kDkvStageBytes = 2 * kStreamBytes + kStreamRows * sizeof(QueryStats);
constexpr int kDkvStagesBytes = 2 * kDkvStageBytes > kSumsBytes ? 2 * kDkvStageBytes : kSumsBytes;
constexpr int kTiledDkvSharedBytes = kDkvStagesBytes + sizeof(DkvBlock<bf16>);

MPLUG2_DEVICE DkvStage dkv_stage(int offset, int row) {
  unsigned char* q = shared_memory() + offset;
  return {q + row * kStreamRowBytes, q + kStreamBytes + row * kStreamRowBytes,
          reinterpret_cast<QueryStats*>(q + 2 * kStreamBytes) + row};
}

// A tile of rows into a stage, in flight; zeros from the last row on, which add nothing whatever their weights.
template <class T>
MPLUG2_DEVICE void copy_queries(const DkvStage& stage, const TiledDkvParams<T>& p, const DkvBlock<T>& block, int tile) {
  const int c = threadIdx.x % kHeadChunks;
  MPLUG2_UNROLL
  for (int i = 0; i < kStreamRows; i += kRowsAtOnce) {
    const int r = i + threadIdx.x / kHeadChunks, row = tile * kStreamRows + r;
    const bool is_valid = row < p.rows;
    cp_async16(stream_chunk(stage.q, r, c), block.q + (is_valid ? row * p.q.token : 0) + c * kChunk, is_valid);
    cp_async16(stream_chunk(stage.dout, r, c), block.dout + (is_valid ? row * p.dout.token : 0) + c * kChunk, is_valid);
  }
  const int r = threadIdx.x, row = tile * kStreamRows + r;
  if (r < kStreamRows) cp_async16(stage.stats + r, block.stats + (row < p.rows ? row : 0), row < p.rows);
  cp_async_commit();
}

// The next tile of rows from this one on of which any sees a key of the block.
template <class T>
MPLUG2_DEVICE int next_row_tile(const TiledDkvParams<T>& p, const DkvBlock<T>& block, int tile) {
  for (; tile < block.end_tile; ++tile) {
    const int first = tile * kStreamRows;
    if (QuerySpan(first, min(first + kStreamRows, p.rows), p.mask.queries).last + block.seen.lead > block.first_key)
      break;
  }
  return tile;
}

template <class T>
MPLUG2_KERNEL(kTiledBwdThreads, kTiledBwdBlocks)
tiled_bwd_dkv_kernel(TiledDkvParams<T> p) {
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int sharers = 1 << p.sharers_log2;
  DkvBlock<T>& block = *reinterpret_cast<DkvBlock<T>*>(shared_memory() + kDkvStagesBytes);
  if (threadIdx.x == 0) block = DkvBlock<T>(p);
  __syncthreads();

  // the first rows; keys and values
  int tile = next_row_tile(p, block, int64_t{tiles_of(p.rows, kStreamRows)} * blockIdx.y / p.splits);
  if (tile < block.end_tile) copy_queries(dkv_stage(0, 0), p, block, tile);
  const int first_key = block.first_key + (warp >> p.sharers_log2) * kOwnRows;
  uint32_t k[kOwnTiles][kHeadSteps][4], v[kOwnTiles][kHeadSteps][4];
  MPLUG2_UNROLL
  for (int m = 0; m < kOwnTiles; ++m) {
    load_rows(k[m], p.k.at(block.batch, block.head), p.k.token, first_key + m * kTileRows, block.seen.end);
    load_rows(v[m], p.v.at(block.batch, block.head), p.v.token, first_key + m * kTileRows, block.seen.end);
  }

  float dk[kOwnTiles][kHeadChunks][4] = {}, dv[kOwnTiles][kHeadChunks][4] = {};
  for (int offset = kDkvStageBytes; tile < block.end_tile;) {  // of the stage to fill, then of the one to read
    cp_async_wait<0>();
    __syncthreads();
    tile = next_row_tile(p, block, tile + 1);
    if (tile < block.end_tile) copy_queries(dkv_stage(offset, 0), p, block, tile);
    offset = kDkvStageBytes - offset;
    if (first_key >= block.seen.end) continue;

    for (int step = (warp & (sharers - 1)) * kStepRows; step < kStreamRows; step += sharers * kStepRows) {
      const DkvStage rows = dkv_stage(offset, step);
      if (!rows.stats[0].is_row) break;
      // All of the rows see the keys before `whole_end`, none those from `rows_end` on.
      int whole_end = rows.stats[0].end, rows_end = rows.stats[kStepRows - 1].end;
      if (rows_end - whole_end != kStepRows - 1) {  // of several groups, or the last
        whole_end = block.seen.lead;
        rows_end = block.seen.lead + p.mask.queries - 1;
      }
      if (rows_end <= first_key) continue;

      // weights and dscores, as the a of the next products: d of two tiles of 8 rows is a of 16 rows
      uint32_t weights[kOwnTiles][4], dscores[kOwnTiles][4];
      MPLUG2_UNROLL
      for (int n = 0; n < 2; ++n) {
        float s[kOwnTiles][4], d[kOwnTiles][4];
        float2 stats[2];  // of rows 2t and 2t + 1
        multiply_rows<T>(s, k, rows.q + n * 8 * kStreamRowBytes);
        multiply_rows<T>(d, v, rows.dout + n * 8 * kStreamRowBytes);
        MPLUG2_UNROLL
        for (int j = 0; j < 2; ++j) stats[j] = *reinterpret_cast<const float2*>(&rows.stats[n * 8 + 2 * t + j].shift);
        if (whole_end < min(first_key + kOwnRows, block.seen.end)) {
          MPLUG2_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int keys = rows.stats[n * 8 + 2 * t + j].end - first_key - g;
            MPLUG2_UNROLL
            for (int m = 0; m < kOwnTiles; ++m) MPLUG2_UNROLL
            for (int half = 0; half < 2; ++half)
              if (m * kTileRows + 8 * half >= keys) s[m][2 * half + j] = -INFINITY;
          }
        }
        MPLUG2_UNROLL
        for (int m = 0; m < kOwnTiles; ++m) {
          MPLUG2_UNROLL
          for (int j = 0; j < 4; ++j) {
            s[m][j] = exp2_approx(fmaf(s[m][j], p.scale_log2, stats[j % 2].x));
            d[m][j] = s[m][j] * (d[m][j] - stats[j % 2].y);
          }
          MPLUG2_UNROLL
          for (int half = 0; half < 2; ++half) {
            weights[m][2 * n + half] = pack<T>(s[m][2 * half], s[m][2 * half + 1]);
            dscores[m][2 * n + half] = pack<T>(d[m][2 * half], d[m][2 * half + 1]);
          }
        }
      }
      add_rows<T>(dv, weights, rows.dout);
      add_rows<T>(dk, dscores, rows.q);
    }
  }

  // A hidden key's numbers have stayed in its own rows of the sums.
  const auto has = [&](int key) { return block.seen.has(block.first_key + key); };
  const int count = min(owned_rows(sharers), p.mask.keys - block.first_key);
  const int64_t unit = block.batch * p.heads + block.head, part_rows = static_cast<int64_t>(p.units) * p.mask.keys;
  float* part = p.parts == nullptr
                    ? nullptr
                    : p.parts + (2 * blockIdx.y * part_rows + unit * p.mask.keys + block.first_key) * kHead;
  store_sums(p.dk.at(block.batch, block.head) + block.first_key * p.dk.token, p.dk.token, part, count, sharers, dk,
             p.scale, has);
  store_sums(p.dv.at(block.batch, block.head) + block.first_key * p.dv.token, p.dv.token,
             part == nullptr ? nullptr : part + part_rows * kHead, count, sharers, dv, 1.0f, has);
}

}  // namespace mplug2::attention
