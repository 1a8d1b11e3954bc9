// Attention of short rows, backward: what a warp does. Two warps own the same keys. One makes weights of 16 queries and
// adds to dV, the other makes ds of the weights and adds to dK; ds of all pairs together make dq.
#pragma once
#include "attention/attention_tokens.cuh"

namespace mplug2::attention {

constexpr int kPairs = 4;  // of warps: the first four make weights, the others ds
constexpr int kShortBwdThreads = 2 * kPairs * kWarp;
constexpr int kStageRows = 32;                        // queries that are copied together
constexpr int kTensorBytes = kStageRows * kRowBytes;  // of q, dout or out in a stage
constexpr int kRestFloats = 72;                       // of a row of the rest's sums: 64; 72 avoids bank conflicts

// What a warp keeps of its keys.
template <int kTiles>
struct OwnKeys {
  uint32_t rows[kTiles][kHeadSteps][4];  // of K or V, as a
  float sum[kTiles][kHeadChunks][4];     // of dV or dK, as d
};

// A warp's tile of the rest, in bytes of shared memory: K or V, where in a column of ds, sums of dV or dK.
struct ShortRest {
  int rows, ds, sums;
  int keys;
};

// 16 queries in shared memory.
struct ShortStep {
  unsigned char* rows;  // of q
  unsigned char* ds;    // their two columns
  const float* lse;
  float* delta;
  bool is_half;  // 8 queries at most
  int barrier;   // delta and weights of the first 8 are there; the next one: of all
  MPLUG2_DEVICE unsigned char* q() const { return rows; }
  MPLUG2_DEVICE unsigned char* dout() const { return rows + kTensorBytes; }
  MPLUG2_DEVICE unsigned char* out() const { return rows + 2 * kTensorBytes; }
};

// What a lane reads of 16 rows for ldmatrix, of two chunks from 2 i on, and of 8 rows, of four chunks from 4 i on.
MPLUG2_DEVICE int rows16(int i) {
  const int lane = threadIdx.x % kWarp;
  return (lane % 16 * kRowBytes + (lane / 16 ^ lane % 8) * 16) ^ (i * 32);
}
MPLUG2_DEVICE int rows8(int i) {
  const int lane = threadIdx.x % kWarp;
  return (lane % 8 * kRowBytes + (lane / 8 ^ lane % 8) * 16) ^ (i * 64);
}

// d[n] += 16 rows of `left` times the n-th eight rows of `right`, over H.
template <class T>
MPLUG2_DEVICE void multiply_rows(float (&d)[2][1][4], unsigned char* left, unsigned char* right, bool is_half) {
  MPLUG2_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t a[2][4];
    ldmatrix_x4(a[0], left + rows16(2 * i));
    ldmatrix_x4(a[1], left + rows16(2 * i + 1));
    MPLUG2_UNROLL
    for (int n = 0; n < 2; ++n)
      if (n == 0 || !is_half) {
        uint32_t b[4];
        ldmatrix_x4(b, right + n * 8 * kRowBytes + rows8(i));
        mma_m16n8k16<T>(d[n][0], a[0], b[0], b[1]);
        mma_m16n8k16<T>(d[n][0], a[1], b[2], b[3]);
      }
  }
}

// delta = dout . out, by the instructions that make dout . v: with a single key both are the same to the bit.
template <class T>
MPLUG2_DEVICE void make_delta(const ShortStep& s) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  float d[2][1][4] = {};
  multiply_rows<T>(d, s.out(), s.dout(), s.is_half);
  if (t == g / 2) {
    s.delta[g] = g % 2 ? d[0][0][1] : d[0][0][0];
    s.delta[g + 8] = g % 2 ? d[1][0][3] : d[1][0][2];
  }
}

// Eight queries of K q^T to weights, or of V dout^T to ds: as the a of the next product, and in shared memory, where
// ds take the place of the weights. Those cross it as fp16: rounded to bf16 they would cost ds accuracy.
template <class T, int kTiles>
MPLUG2_DEVICE void make_factor(uint32_t (&factor)[kTiles][4], const float (&d)[kTiles][4], bool is_weights, int n,
                               const ShortStep& s, unsigned char* ds, int keys, float scale_log2) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const float2 row = *reinterpret_cast<const float2*>((is_weights ? s.lse : s.delta) + n * 8 + 2 * t);
  uint32_t* shared = reinterpret_cast<uint32_t*>(ds) + g * 4 + t;
  if (is_weights) {
    MPLUG2_UNROLL
    for (int m = 0; m < kTiles; ++m) MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float x = exp2_approx(fmaf(d[m][2 * half], scale_log2, -row.x)),
                  y = exp2_approx(fmaf(d[m][2 * half + 1], scale_log2, -row.y));
      factor[m][2 * n + half] = pack<T>(x, y);
      shared[(m * kTileRows + half * 8) * 4] = pack<fp16>(x, y);
    }
  } else {
    MPLUG2_UNROLL
    for (int m = 0; m < kTiles; ++m) MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int key = m * kTileRows + half * 8;
      const float2 weight = unpack<fp16>(shared[key * 4]);
      const uint32_t pair = pack<T>(weight.x * (d[m][2 * half] - row.x), weight.y * (d[m][2 * half + 1] - row.y));
      factor[m][2 * n + half] = pair;
      shared[key * 4] = key < keys - g ? pair : 0;
    }
  }
}

// 16 queries of a warp's keys and, where it is given, of the rest.
template <class T, int kTiles>
MPLUG2_DEVICE void take_queries(OwnKeys<kTiles>& own, const ShortStep& s, bool is_weights, int first_key, int keys,
                                const ShortRest* rest, int column, float scale_log2) {
  unsigned char* left = is_weights ? s.q() : s.dout();
  unsigned char* right = is_weights ? s.dout() : s.q();

  // weights = exp(scale K q^T - lse), or ds = weights (V dout^T - delta), 8 queries at a time
  uint32_t factor[kTiles][4], rest_factor[1][4];
  MPLUG2_UNROLL
  for (int n = 0; n < 2; ++n) {
    float d[kTiles][4] = {};
    if (n == 0 || !s.is_half) {
      MPLUG2_UNROLL
      for (int i = 0; i < 2; ++i) {
        uint32_t b[4];
        ldmatrix_x4(b, left + n * 8 * kRowBytes + rows8(i));
        MPLUG2_UNROLL
        for (int j = 0; j < 2; ++j) MPLUG2_UNROLL
        for (int m = 0; m < kTiles; ++m) mma_m16n8k16<T>(d[m], own.rows[m][2 * i + j], b[2 * j], b[2 * j + 1]);
      }
    }
    if (!is_weights) named_barrier_sync(s.barrier + n, kShortBwdThreads);
    make_factor<T>(factor, d, is_weights, n, s, s.ds + n * column + first_key * 16, keys - first_key, scale_log2);
    if (is_weights && n == 0) named_barrier_arrive(s.barrier, kShortBwdThreads);
  }
  if (rest != nullptr) {
    float d[2][1][4] = {};
    multiply_rows<T>(d, shared_memory() + rest->rows, left, s.is_half);
    MPLUG2_UNROLL
    for (int n = 0; n < 2; ++n)
      make_factor<T>(rest_factor, d[n], is_weights, n, s, s.ds + n * column + rest->ds, rest->keys, scale_log2);
  }
  if (is_weights) named_barrier_arrive(s.barrier + 1, kShortBwdThreads);

  // dV += weights^T dout, or dK += ds^T q
  MPLUG2_UNROLL
  for (int i = 0; i < kHeadSteps; ++i) {
    uint32_t b[4];
    ldmatrix_x4_transposed(b, right + rows16(i));
    MPLUG2_UNROLL
    for (int m = 0; m < kTiles; ++m) MPLUG2_UNROLL
    for (int j = 0; j < 2; ++j) mma_m16n8k16<T>(own.sum[m][2 * i + j], factor[m], b[2 * j], b[2 * j + 1]);
    if (rest != nullptr) {
      const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4, rows = rest->keys - g;
      float* sums = reinterpret_cast<float*>(shared_memory() + rest->sums) + g * kRestFloats + i * 16 + 2 * t;
      MPLUG2_UNROLL
      for (int j = 0; j < 2; ++j) {
        float d[4] = {};
        mma_m16n8k16<T>(d, rest_factor[0], b[2 * j], b[2 * j + 1]);
        MPLUG2_UNROLL
        for (int half = 0; half < 2; ++half)
          if (8 * half < rows) {
            float2* sum = reinterpret_cast<float2*>(sums + half * 8 * kRestFloats + j * 8);
            *sum = make_float2(sum->x + d[2 * half], sum->y + d[2 * half + 1]);
          }
      }
    }
  }
}

// dq = scale ds k: of 16 kRows queries 16 kColumns numbers of H from a chunk on. `end` of the rows are there.
template <class T, int kRows, int kColumns>
MPLUG2_DEVICE void make_dq(unsigned char* ds, int column, unsigned char* k, int keys, int chunk, T* dq, int64_t token,
                           int end, float scale) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  float d[kRows][2 * kColumns][4] = {};
  int key = 0;
  for (; key + 8 < keys; key += 16) {
    uint32_t a[kRows][4];
    MPLUG2_UNROLL
    for (int r = 0; r < kRows; ++r)
      ldmatrix_x4_transposed(a[r], ds + (2 * r + lane / 8 % 2) * column + (key + lane / 16 * 8 + lane % 8) * 16);
    MPLUG2_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, k + key * kRowBytes + rows16(chunk / 2 + c));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        mma_m16n8k16<T>(d[r][2 * c], a[r], b[0], b[1]);
        mma_m16n8k16<T>(d[r][2 * c + 1], a[r], b[2], b[3]);
      }
    }
  }
  if (key < keys) {
    uint32_t a[kRows][2];
    MPLUG2_UNROLL
    for (int r = 0; r < kRows; ++r)
      ldmatrix_x2_transposed(a[r], ds + (2 * r + lane / 8 % 2) * column + (key + lane % 8) * 16);
    MPLUG2_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      uint32_t b[2];
      ldmatrix_x2_transposed(
          b, k + key * kRowBytes + lane % 8 * kRowBytes + ((chunk + 2 * c + lane / 8 % 2 ^ lane % 8) * 16));
      MPLUG2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        mma_m16n8k8<T>(d[r][2 * c], a[r], b[0]);
        mma_m16n8k8<T>(d[r][2 * c + 1], a[r], b[1]);
      }
    }
  }

  // Lane t of a quad gets a whole chunk: of row g or g + 8, of the first or the second tile.
  MPLUG2_UNROLL
  for (int r = 0; r < kRows; ++r) MPLUG2_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    uint32_t words[4];
    MPLUG2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = d[r][2 * c + i % 2];
      words[i] = pack<T>(tile[i / 2 * 2] * scale, tile[i / 2 * 2 + 1] * scale);
    }
    transpose_quad(words);
    const int row = r * kTileRows + t / 2 * 8 + g;
    if (row < end)
      store16(dq + row * token + (chunk + 2 * c + t % 2) * kChunk, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace mplug2::attention
