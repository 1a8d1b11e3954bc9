// Sixteen queries of a warp and the forward pass over keys and values in shared memory: scores, online softmax, weights
// times values; and how parts that saw different keys are put together.
#pragma once
#include "attention/attention_tokens.cuh"

namespace mplug2::attention {

// What `top` is before any key; finite, so that hidden scores, -inf, get the weight 0 and never inf - inf.
constexpr float kNoTop = -3e38f;

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
      top[half] = kNoTop;
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

// kTiles tiles of keys, whose first rows in shared memory are `k` and `v`, for the first kRows tiles of queries.
// hide(r, scores) sets the scores to -inf of the keys that tile r of queries does not see.
template <class T, int kTiles, int kRows, int kAllRows, class Hide>
MPLUG2_DEVICE void attend(QueryTile (&rows)[kAllRows], unsigned char* k, unsigned char* v, float scale_log2,
                          const Hide& hide) {
  const int lane = threadIdx.x % kWarp;

  // scores = q k^T
  float scores[kRows][kTiles][4] = {};
  MPLUG2_UNROLL
  for (int n = 0; n < kTiles; ++n) MPLUG2_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t b[4];
    ldmatrix_x4(b, chunk_at(k, n * kTileKeys + lane % 8, 4 * i + lane / 8));
    MPLUG2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      mma_m16n8k16<T>(scores[r][n], rows[r].q[2 * i], b[0], b[1]);
      mma_m16n8k16<T>(scores[r][n], rows[r].q[2 * i + 1], b[2], b[3]);
    }
  }

  // weights, as the a of the next product: d of two tiles of keys is a of 16 keys
  uint32_t weights[kRows][kTiles][2];
  MPLUG2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    hide(r, scores[r]);
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
      ldmatrix_x4_transposed(b, chunk_at(v, lane % 8, 4 * i + lane / 8));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) MPLUG2_UNROLL
      for (int j = 0; j < 4; ++j) mma_m16n8k8<T>(rows[r].out[4 * i + j], weights[r][0], b[j]);
    }
  } else {
    MPLUG2_UNROLL
    for (int n = 0; n < kTiles; n += 2) MPLUG2_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, chunk_at(v, n * kTileKeys + lane % 16, 2 * i + lane / 16));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const uint32_t a[] = {weights[r][n][0], weights[r][n][1], weights[r][n + 1][0], weights[r][n + 1][1]};
        mma_m16n8k16<T>(rows[r].out[2 * i], a, b[0], b[1]);
        mma_m16n8k16<T>(rows[r].out[2 * i + 1], a, b[2], b[3]);
      }
    }
  }
}

// A tile of queries that has seen all its keys: rows [first, end) of a head of out, and store_lse(row, lse). A row that
// saw no key gives 0 and -inf.
template <class T, class StoreLse>
MPLUG2_DEVICE void store_queries(T* out, int64_t token, int first, int end, const QueryTile& rows,
                                 const StoreLse& store_lse) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  float inverse[2];
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(rows.sum[half]);
    const int row = first + g + 8 * half;
    inverse[half] = 1 / (sum == 0 ? 1 : sum);
    if (t == 0 && row < end) store_lse(row, rows.top[half] * kLn2 + logf(sum));
  }
  store_rows(out, token, first, end, rows.out, inverse);
}

// ---- parts: what some of the keys make of a row ---------------------------------------------------------------------
// Float32: the first four numbers of each chunk of out (32), top, sum, 2 unused, the other four of each (32), 4 unused;
// so neither the writes of fragments nor the reads of chunks meet bank conflicts.
constexpr int kPartFloats = 72, kPartTop = 32, kPartSum = 33, kPartSecond = 36;

// A tile of queries to 16 rows of parts.
MPLUG2_DEVICE void store_parts(float* parts, const QueryTile& rows) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    float* part = parts + (g + 8 * half) * kPartFloats;
    MPLUG2_UNROLL
    for (int i = 0; i < kHeadChunks; ++i)
      store_pair(part + t / 2 * kPartSecond + i * 4 + t % 2 * 2, rows.out[i][2 * half], rows.out[i][2 * half + 1]);
    const float sum = quad_sum(rows.sum[half]);
    if (t == 0) store_pair(part + kPartTop, rows.top[half], sum);
  }
}

// A row whose parts are together, chunk c of it.
struct MergedRow {
  float out[kChunk] = {};
  float top = kNoTop, sum = 0;

  // Parts 0 to n - 1, `stride` floats apart, added in this order: the same bits every time.
  MPLUG2_DEVICE MergedRow(const float* part, int64_t stride, int n, int c) {
    for (int i = 0; i < n; ++i) top = fmaxf(top, part[i * stride + kPartTop]);
    for (int i = 0; i < n; ++i) {
      const float* from = part + i * stride;
      const float factor = exp2_approx(from[kPartTop] - top);
      sum += factor * from[kPartSum];
      float values[kChunk];
      load_floats(values, from + c * 4);
      load_floats(values + 4, from + kPartSecond + c * 4);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) out[j] += factor * values[j];
    }
  }
  // As one part.
  MPLUG2_DEVICE void store_part(float* part, int c) const {
    store_floats(part + c * 4, out);
    store_floats(part + kPartSecond + c * 4, out + 4);
    if (c == 0) store_pair(part + kPartTop, top, sum);
  }
  // As store_queries.
  template <class T>
  MPLUG2_DEVICE void store_out(T* to) const {
    const float inverse = 1 / (sum == 0 ? 1 : sum);
    float values[kChunk];
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) values[j] = out[j] * inverse;
    store16(to, pack_chunk<T>(values));
  }
  MPLUG2_DEVICE float lse() const { return top * kLn2 + logf(sum); }
};

}  // namespace mplug2::attention
