// Attention of short rows, forward. A block is one head of one row: its keys and values lie in shared memory whole, its
// queries in registers, 32 a warp, so that a fragment of keys or values feeds two matrix instructions. What is left
// beyond a multiple of 32 (the 257th query) is one more tile of 16 rows, whose keys the warps share.
#pragma once
#include "attention/attention_tokens.cuh"

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
constexpr int kStripFloats = 72;          // of a row of the strip's parts: out (64), top, sum; 72 avoids bank conflicts

// Every warp has 32 rows whose fragments the strip can share.
MPLUG2_DEVICE bool has_strip(int queries) {
  const int left = queries % kWarpRows;
  return queries >= kShortFwdWarps * kWarpRows && 0 < left && left <= kTileRows;
}

constexpr int short_fwd_shared_bytes(int keys) {
  const int tiles = 2 * padded_keys(keys) * kRowBytes, strip = kShortFwdWarps * kTileRows * kStripFloats * 4;
  return tiles > strip ? tiles : strip;
}

// 16 queries and what is known of them so far.
struct QueryTile {
  uint32_t q[kHeadSteps][4];
  float out[kHeadChunks][4];  // sum over keys of weight v, as d of eight tiles
  float top[2];               // exponent that the weights are relative to, of rows g and g + 8: weight 2^(s - top)
  float sum[2];               // of this lane's weights

  MPLUG2_DEVICE void clear() {
    MPLUG2_UNROLL
    for (int i = 0; i < kHeadChunks; ++i) MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) out[i][j] = 0;
    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      top[half] = -INFINITY;
      sum[half] = 0;
    }
  }
};

// Scores of a tile of queries to weights, and their sums. The reference exponent follows the largest score only when
// that is more than 2^8 above it: weights then stay below 2^8, and out is seldom scaled.
template <int kTiles>
MPLUG2_DEVICE void take_weights(QueryTile& rows, float (&scores)[kTiles][4], float scale_log2) {
  constexpr float kSlack = 8;
  float top[2] = {-INFINITY, -INFINITY};
  MPLUG2_UNROLL
  for (int n = 0; n < kTiles; ++n) MPLUG2_UNROLL
  for (int j = 0; j < 4; ++j) top[j / 2] = fmaxf(top[j / 2], scores[n][j]);
  top[0] *= scale_log2;
  top[1] *= scale_log2;
  if (__any_sync(0xffffffffu, top[0] > rows.top[0] + kSlack || top[1] > rows.top[1] + kSlack)) {
    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(rows.top[half], quad_max(top[half])), shrink = exp2_approx(rows.top[half] - raised);
      rows.top[half] = raised;
      rows.sum[half] *= shrink;
      MPLUG2_UNROLL
      for (int i = 0; i < kHeadChunks; ++i) {
        rows.out[i][2 * half] *= shrink;
        rows.out[i][2 * half + 1] *= shrink;
      }
    }
  }
  MPLUG2_UNROLL
  for (int n = 0; n < kTiles; ++n) MPLUG2_UNROLL
  for (int j = 0; j < 4; ++j) {
    scores[n][j] = exp2_approx(fmaf(scores[n][j], scale_log2, -rows.top[j / 2]));
    rows.sum[j / 2] += scores[n][j];
  }
}

// kTiles tiles of keys from `first` on, for the first kRows tiles of queries. A single tile may reach beyond the keys.
template <class T, int kTiles, int kRows, int kAllRows>
MPLUG2_DEVICE void attend(QueryTile (&rows)[kAllRows], unsigned char* k, unsigned char* v, int first, int keys,
                          float scale_log2) {
  const int lane = threadIdx.x % kWarp;

  // scores = q k^T
  float scores[kRows][kTiles][4] = {};
  MPLUG2_UNROLL
  for (int n = 0; n < kTiles; ++n) MPLUG2_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t b[4];
    ldmatrix_x4(b, chunk_at(k, first + n * kTileKeys + lane % 8, 4 * i + lane / 8));
    MPLUG2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      mma_m16n8k16<T>(scores[r][n], rows[r].q[2 * i], b[0], b[1]);
      mma_m16n8k16<T>(scores[r][n], rows[r].q[2 * i + 1], b[2], b[3]);
    }
  }
  if constexpr (kTiles == 1) {
    MPLUG2_UNROLL
    for (int r = 0; r < kRows; ++r) MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j)
      if (first + lane % 4 * 2 + j % 2 >= keys) scores[r][0][j] = -INFINITY;
  }

  // weights, as the a of the next product: d of two tiles of keys is a of 16 keys
  uint32_t weights[kRows][kTiles][2];
  MPLUG2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    take_weights(rows[r], scores[r], scale_log2);
    MPLUG2_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      weights[r][n][0] = pack<T>(scores[r][n][0], scores[r][n][1]);
      weights[r][n][1] = pack<T>(scores[r][n][2], scores[r][n][3]);
    }
  }

  // out += weights v
  if constexpr (kTiles == 1) {
    MPLUG2_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, chunk_at(v, first + lane % 8, 4 * i + lane / 8));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) MPLUG2_UNROLL
      for (int j = 0; j < 4; ++j) mma_m16n8k8<T>(rows[r].out[4 * i + j], weights[r][0], b[j]);
    }
  } else {
    MPLUG2_UNROLL
    for (int n = 0; n < kTiles; n += 2) MPLUG2_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, chunk_at(v, first + n * kTileKeys + lane % 16, 2 * i + lane / 16));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint32_t a[] = {weights[r][n][0], weights[r][n][1], weights[r][n + 1][0], weights[r][n + 1][1]};
        mma_m16n8k16<T>(rows[r].out[2 * i], a, b[0], b[1]);
        mma_m16n8k16<T>(rows[r].out[2 * i + 1], a, b[2], b[3]);
      }
    }
  }
}

template <class T>
MPLUG2_KERNEL(kShortFwdThreads, kShortFwdBlocks)
short_fwd_kernel(ShortFwdParams<T> p) {
  const int64_t batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool strip = has_strip(p.queries);
  const int units = strip ? p.queries / kWarpRows : (p.queries + kWarpRows - 1) / kWarpRows;  // of 32 rows
  const int strip_first = units * kWarpRows;
  const T* q = p.q.at(batch, head);
  T* out = p.out.at(batch, head);
  float* lse = p.lse == nullptr ? nullptr : p.lse + static_cast<int64_t>(blockIdx.x) * p.queries;
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

  for (int unit = warp; unit < units; unit += kShortFwdWarps) {
    rows[0].clear();
    rows[1].clear();
    // The warp's last 32 rows take its share of the strip along: every fourth step.
    const bool with_strip = strip && unit + kShortFwdWarps >= units;
    if (with_strip) load_rows(rows[2].q, q, p.q.token, strip_first, p.queries);
    int key = 0, share = kShortFwdWarps - warp;
    for (; key + kStepTiles * kTileKeys <= p.keys; key += kStepTiles * kTileKeys, ++share) {
      if (with_strip && share % kShortFwdWarps == 0) {  // in halves: all at once spills registers
        attend<T, kStepTiles / 2, 3>(rows, k_tile, v_tile, key, p.keys, p.scale_log2);
        attend<T, kStepTiles / 2, 3>(rows, k_tile, v_tile, key + kStepTiles / 2 * kTileKeys, p.keys, p.scale_log2);
      } else {
        attend<T, kStepTiles, 2>(rows, k_tile, v_tile, key, p.keys, p.scale_log2);
      }
    }
    for (; key < p.keys; key += kTileKeys, ++share) {
      if (with_strip && share % kShortFwdWarps == 0)
        attend<T, 1, 3>(rows, k_tile, v_tile, key, p.keys, p.scale_log2);
      else
        attend<T, 1, 2>(rows, k_tile, v_tile, key, p.keys, p.scale_log2);
    }

    // out, lse; the next queries
    MPLUG2_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int first = unit * kWarpRows + r * kTileRows;
      float inverse[2];
      MPLUG2_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(rows[r].sum[half]);
        const int row = first + g + 8 * half;
        inverse[half] = 1 / sum;
        if (lse != nullptr && t == 0 && row < p.queries) lse[row] = rows[r].top[half] * kLn2 + logf(sum);
      }
      store_rows(out, p.out.token, first, p.queries, rows[r].out, inverse);
      load_rows(rows[r].q, q, p.q.token, first + kShortFwdWarps * kWarpRows, p.queries);
    }
  }
  if (!strip) return;

  // the strip: parts of all warps where keys and values were, added in the order of warps
  float* parts = reinterpret_cast<float*>(shared_memory());  // (warps, kTileRows, kStripFloats)
  const int strip_rows = p.queries - strip_first;
  __syncthreads();
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(rows[2].sum[half]);
    const int row = g + 8 * half;
    float* part = parts + (warp * kTileRows + row) * kStripFloats;
    if (row < strip_rows) {
      MPLUG2_UNROLL
      for (int i = 0; i < kHeadChunks; ++i)
        *reinterpret_cast<float2*>(part + i * kChunk + 2 * t) =
            make_float2(rows[2].out[i][2 * half], rows[2].out[i][2 * half + 1]);
      if (t == 0) *reinterpret_cast<float2*>(part + kHead) = make_float2(rows[2].top[half], sum);
    }
  }
  __syncthreads();
  const int row = threadIdx.x / kHeadChunks, chunk = threadIdx.x % kHeadChunks;
  if (row >= strip_rows) return;
  float top = -INFINITY, sum = 0, total[kChunk] = {};
  MPLUG2_UNROLL
  for (int w = 0; w < kShortFwdWarps; ++w) top = fmaxf(top, parts[(w * kTileRows + row) * kStripFloats + kHead]);
  MPLUG2_UNROLL
  for (int w = 0; w < kShortFwdWarps; ++w) {
    const float* part = parts + (w * kTileRows + row) * kStripFloats;
    const float factor = exp2_approx(part[kHead] - top);
    sum += factor * part[kHead + 1];
    float values[kChunk];
    load_floats(values, part + chunk * kChunk);
    load_floats(values + 4, part + chunk * kChunk + 4);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) total[j] += factor * values[j];
  }
  MPLUG2_UNROLL
  for (int j = 0; j < kChunk; ++j) total[j] *= 1 / sum;
  store16(out + (strip_first + row) * p.out.token + chunk * kChunk, pack_chunk<T>(total));
  if (lse != nullptr && chunk == 0) lse[strip_first + row] = top * kLn2 + logf(sum);
}

}  // namespace mplug2::attention
