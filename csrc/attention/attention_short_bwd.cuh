// Attention of short rows, backward. A block is one head of one row and passes once over its queries. Two warps own up
// to 64 keys: one keeps K and dV in registers and makes weights, the other keeps V and dK and makes ds of them. A
// fragment of queries so feeds four matrix instructions. dq sums over all keys: ds crosses shared memory. Keys beyond a
// multiple of 64 (the 257th) are the rest: a tile of 16 rows that the pairs of warps take by turns.
#pragma once
#include "attention/attention_short_bwd_warp.cuh"

namespace mplug2::attention {

constexpr int kShortBwdKeys = 320, kShortBwdRows = 320;     // K and S at most
constexpr int kStages = 2, kStageBytes = 3 * kTensorBytes;  // q, dout and out of the queries that are copied together
constexpr int kDqRows = 2 * kTileRows;                      // queries of dq of a warp at a time
constexpr int kBlockRows = 64;                              // queries that make dq together where not all of them fit

// Tiles of 16 keys that each pair owns: enough for all but 16 keys, of the longest rows for all but 64.
constexpr int short_bwd_tiles(int keys) {
  const int pair_rows = kPairs * kTileRows;
  return keys <= pair_rows + kTileRows ? 1 : keys <= 3 * pair_rows + kTileRows ? 3 : 4;
}

// Where things lie in shared memory, in bytes: what does not depend on lengths first.
constexpr int kLseAt = 0;                                   // (S) float, in powers of two
constexpr int kDeltaAt = kLseAt + kShortBwdRows * 4;        // (S) float
constexpr int kOffsetsAt = kDeltaAt + kShortBwdRows * 4;    // ShortOffsets
constexpr int kRestsAt = kOffsetsAt + 64;                   // ShortRest of every warp
constexpr int kStagesAt = kRestsAt + 192;                   // (kStages, 3, kStageRows, H)
constexpr int kKeysAt = kStagesAt + kStages * kStageBytes;  // (key_rows, H): K
struct ShortBwdLayout {
  int main_keys;         // the pairs' own
  int rest, rest_tiles;  // keys, and tiles of 16 of them
  int key_rows;          // whole tiles
  int column;            // bytes of a column of ds: eight queries and all keys
  int ds;                // (queries / 8, key_rows, 8)
  int v_rest;            // (16 rest_tiles, H)
  int sum_rows, sums;    // dv and dk of the rest: (2, kPairs, sum_rows, kRestFloats) float
  int bytes;
  // `rows`: queries whose ds lie there together.
  constexpr ShortBwdLayout(int rows, int keys)
      : main_keys(short_bwd_tiles(keys) * kPairs * kTileRows),
        rest(keys > main_keys ? keys - main_keys : 0),
        rest_tiles((rest + kTileRows - 1) / kTileRows),
        key_rows(main_keys + rest_tiles * kTileRows),
        column(key_rows * 16),
        ds(kKeysAt + key_rows * kRowBytes),
        v_rest(ds + (rows + kTileRows - 1) / kTileRows * 2 * column),
        sum_rows(rest < kTileRows ? rest : kTileRows),
        sums(v_rest + rest_tiles * kTileRows * kRowBytes),
        bytes(sums + 2 * kPairs * sum_rows * kRestFloats * 4) {}
};

template <class T>
struct ShortBwdParams {
  Tokens<const T> q, out, dout;  // (B, S, N, H)
  Tokens<const T> k, v;          // (B, K, N, H)
  const float* lse;              // (B, N, S)
  Tokens<T> dq;                  // (B, S, N, H)
  Tokens<T> dk, dv;              // (B, K, N, H)
  int queries, keys, heads;
  float scale, scale_log2;  // scale log2(e): exponentials are powers of two
  ShortBwdLayout layout;
};

// Where the head begins in each tensor. In shared memory, since registers are full of sums.
struct ShortOffsets {
  int64_t q, dout, out, dq, dk, dv;
};

// kWhole: ds of all queries fit into shared memory, and dq comes last, when the registers are free.
template <class T, int kTiles, bool kWhole>
MPLUG2_KERNEL(kShortBwdThreads, kTiles == 1 ? 2 : 1)
short_bwd_kernel(ShortBwdParams<T> p) {
  const int64_t batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int pair = warp % kPairs, first_key = pair * kTiles * kTileRows;
  const bool is_weights = warp < kPairs;
  unsigned char *shared = shared_memory(), *k_tile = shared + kKeysAt, *ds = shared + p.layout.ds;
  float *lse = reinterpret_cast<float*>(shared + kLseAt), *delta = reinterpret_cast<float*>(shared + kDeltaAt),
        *sums = reinterpret_cast<float*>(shared + p.layout.sums);

  // keys, and values of the rest
  const T* v = p.v.at(batch, head);
  copy_rows<kShortBwdThreads>(k_tile, p.k.at(batch, head), p.k.token, p.layout.key_rows, p.keys);
  if (p.layout.rest > 0)
    copy_rows<kShortBwdThreads>(shared + p.layout.v_rest, v + p.layout.main_keys * p.v.token, p.v.token,
                                p.layout.rest_tiles * kTileRows, p.layout.rest);

  // what registers cannot keep
  ShortOffsets& at = *reinterpret_cast<ShortOffsets*>(shared + kOffsetsAt);
  ShortRest* rests = reinterpret_cast<ShortRest*>(shared + kRestsAt);
  if (threadIdx.x == 0)
    at = {p.q.at(batch, head) - p.q.data,   p.dout.at(batch, head) - p.dout.data, p.out.at(batch, head) - p.out.data,
          p.dq.at(batch, head) - p.dq.data, p.dk.at(batch, head) - p.dk.data,     p.dv.at(batch, head) - p.dv.data};
  if (lane == 0) {  // a single tile goes round, several have a pair each
    const int tile = p.layout.rest_tiles > 1 ? pair : 0, key = p.layout.main_keys + tile * kTileRows;
    rests[warp] = {is_weights ? kKeysAt + key * kRowBytes : p.layout.v_rest + tile * kTileRows * kRowBytes, key * 16,
                   p.layout.sums + warp * p.layout.sum_rows * kRestFloats * 4, p.keys - key};
  }
  __syncthreads();

  const auto stage_at = [&](int first) { return shared + kStagesAt + first / kStageRows % kStages * kStageBytes; };
  const auto copy_stage = [&](int first) {  // a chunk of q, dout and out each
    static_assert(kStageRows * kHeadChunks == kShortBwdThreads);
    const int r = threadIdx.x / kHeadChunks, c = threadIdx.x % kHeadChunks;
    const bool valid = first + r < p.queries;
    const int64_t row = valid ? first + r : 0;
    unsigned char* to = stage_at(first) + (threadIdx.x ^ r % 8) * 16;
    cp_async16(to, p.q.data + at.q + row * p.q.token + c * kChunk, valid);
    cp_async16(to + kTensorBytes, p.dout.data + at.dout + row * p.dout.token + c * kChunk, valid);
    cp_async16(to + 2 * kTensorBytes, p.out.data + at.out + row * p.out.token + c * kChunk, valid);
  };

  // the first queries, lse, values
  copy_stage(0);
  cp_async_commit();
  const float* row_lse = p.lse + static_cast<int64_t>(blockIdx.x) * p.queries;
  for (int i = threadIdx.x; i < kShortBwdRows; i += kShortBwdThreads)
    lse[i] = i < p.queries ? row_lse[i] * kLog2E : INFINITY;  // where there is no query all weights are 0
  for (int i = threadIdx.x; i < 2 * kPairs * p.layout.sum_rows * kRestFloats; i += kShortBwdThreads) sums[i] = 0;
  OwnKeys<kTiles> own;
  MPLUG2_UNROLL
  for (int m = 0; m < kTiles; ++m) MPLUG2_UNROLL
  for (int i = 0; i < kHeadChunks; ++i) MPLUG2_UNROLL
  for (int j = 0; j < 4; ++j) own.sum[m][i][j] = 0;
  if (!is_weights) {
    MPLUG2_UNROLL
    for (int m = 0; m < kTiles; ++m) load_rows(own.rows[m], v, p.v.token, first_key + m * kTileRows, p.keys);
  }
  cp_async_wait<0>();
  __syncthreads();
  if (is_weights) {
    MPLUG2_UNROLL
    for (int m = 0; m < kTiles; ++m) MPLUG2_UNROLL
    for (int i = 0; i < kHeadSteps; ++i)
      ldmatrix_x4(own.rows[m][i], k_tile + (first_key + m * kTileRows) * kRowBytes + rows16(i));
  }

  // 16 queries a step
  for (int first = 0; first < p.queries; first += kTileRows) {
    const int in_stage = first % kStageRows, end = first + kTileRows, turn = first / kTileRows % kPairs;
    const bool is_last = end >= p.queries;
    if (in_stage == 0) {
      if (first + kStageRows < p.queries) copy_stage(first + kStageRows);
      cp_async_commit();
    }
    const ShortStep s{stage_at(first) + in_stage * kRowBytes,
                      ds + (kWhole ? first : first % kBlockRows) / 8 * p.layout.column,
                      lse + first,
                      delta + first,
                      p.queries - first <= 8,
                      in_stage / 8};
    const bool with_rest = p.layout.rest_tiles == 1 ? turn == pair : pair < p.layout.rest_tiles;
    if (is_weights && turn == (pair + 2) % kPairs) make_delta<T>(s);
    take_queries<T>(own, s, is_weights, first_key, p.keys, with_rest ? rests + warp : nullptr, p.layout.column,
                    p.scale_log2);
    if constexpr (!kWhole) {
      if (end % kBlockRows == 0 || is_last) {  // a warp makes 32 rows and a quarter of H
        const int row = first / kBlockRows * kBlockRows + warp / 4 * kDqRows;
        unsigned char* row_ds = ds + warp / 4 * (kDqRows / 8) * p.layout.column;
        T* dq = p.dq.data + at.dq + row * p.dq.token;
        __syncthreads();
        if (row + kTileRows < p.queries)
          make_dq<T, 2, 1>(row_ds, p.layout.column, k_tile, padded_keys(p.keys), warp % 4 * 2, dq, p.dq.token,
                           p.queries - row, p.scale);
        else if (row < p.queries)
          make_dq<T, 1, 1>(row_ds, p.layout.column, k_tile, padded_keys(p.keys), warp % 4 * 2, dq, p.dq.token,
                           p.queries - row, p.scale);
      }
    }
    if (end % kStageRows == 0 || is_last) {
      cp_async_wait<0>();
      __syncthreads();
    }
  }

  // dv, dk; of the rest the sums of the pairs in their order
  T* grad = is_weights ? p.dv.data + at.dv : p.dk.data + at.dk;
  const int64_t token = is_weights ? p.dv.token : p.dk.token;
  const float factor[2] = {is_weights ? 1 : p.scale, is_weights ? 1 : p.scale};
  MPLUG2_UNROLL
  for (int m = 0; m < kTiles; ++m) store_rows(grad, token, first_key + m * kTileRows, p.keys, own.sum[m], factor);
  for (int i = threadIdx.x % (kShortBwdThreads / 2); i < p.layout.rest * kHeadChunks; i += kShortBwdThreads / 2) {
    const int row = i / kHeadChunks, chunk = i % kHeadChunks, tile = row / kTileRows;
    const bool goes_round = p.layout.rest_tiles == 1;
    float total[kChunk] = {};
    for (int w = goes_round ? 0 : tile; w < (goes_round ? kPairs : tile + 1); ++w) {
      const float* part = sums + (((is_weights ? 0 : kPairs) + w) * p.layout.sum_rows + row % kTileRows) * kRestFloats;
      float values[kChunk];
      load_floats(values, part + chunk * kChunk);
      load_floats(values + 4, part + chunk * kChunk + 4);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) total[j] += values[j];
    }
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) total[j] *= factor[0];
    store16(grad + (p.layout.main_keys + row) * token + chunk * kChunk, pack_chunk<T>(total));
  }

  // dq: a warp makes 32 rows at a time, and four share up to 16 that are left
  if constexpr (kWhole) {
    const int left = p.queries % kDqRows <= kTileRows ? p.queries % kDqRows : 0, whole = p.queries - left;
    for (int row = warp * kDqRows; row < whole; row += 2 * kPairs * kDqRows)
      make_dq<T, 2, 4>(ds + row / 8 * p.layout.column, p.layout.column, k_tile, padded_keys(p.keys), 0,
                       p.dq.data + at.dq + row * p.dq.token, p.dq.token, p.queries - row, p.scale);
    if (left > 0 && warp < 4)
      make_dq<T, 1, 1>(ds + whole / 8 * p.layout.column, p.layout.column, k_tile, padded_keys(p.keys), warp * 2,
                       p.dq.data + at.dq + whole * p.dq.token, p.dq.token, left, p.scale);
  }
}

}  // namespace mplug2::attention
