// What the kernels of attention's tiled backward pass share. A block owns a tile of rows of one head, and all the rows
// of the other side stream by, 64 at a time; a warp owns 32 rows, so that a fragment of what streams by feeds two
// matrix instructions. Where there are few rows to own, several warps own the same ones and share the stream (sharers),
// and where that makes few blocks, several blocks do (splits). Their parts are added in a fixed order.
#pragma once
#include "attention/attention_mask.cuh"
#include "attention/attention_tokens.cuh"

namespace mplug2::attention {

constexpr int kTiledBwdWarps = 4, kTiledBwdThreads = kTiledBwdWarps * kWarp;
constexpr int kTiledBwdBlocks = 2;  // a multiprocessor: 255 registers a thread

constexpr int kOwnTiles = 2, kOwnRows = kOwnTiles * kTileRows;  // of a warp
constexpr int kStreamRows = 64, kStepRows = 16;                 // of a tile that streams by, and of it at a time
// Rows are 16 bytes apart, so that eight chunks below one another lie in all 32 banks. Chunks that change places
// (chunk_at) would need no such bytes, but a register for the address of every other chunk, and registers are short.
constexpr int kStreamRowBytes = kRowBytes + 16;
constexpr int kStreamBytes = kStreamRows * kStreamRowBytes;
constexpr int kRowsAtOnce = kTiledBwdThreads / kHeadChunks;  // that a block copies
constexpr int kSumFloats = 72;  // of a row of a warp's sums in shared memory: 64, and 8 that avoid bank conflicts
constexpr int kSumsBytes = kTiledBwdWarps * kOwnRows * kSumFloats * 4;

// Rows that a block owns.
constexpr int owned_rows(int sharers) { return kTiledBwdWarps / sharers * kOwnRows; }
constexpr int tiles_of(int rows, int size) { return (rows + size - 1) / size; }

// What the weights of a row and their gradients need.
struct alignas(16) QueryStats {
  float shift, delta;  // weights are 2^(scale log2(e) score + shift); delta = dout . out
  int end;             // where causal, the row sees no key from here on
  int is_row;          // 1; 0 where rows stream by that there are not
};

// Chunk c of row r of rows that stream by.
MPLUG2_DEVICE unsigned char* stream_chunk(unsigned char* rows, int r, int c) {
  return rows + r * kStreamRowBytes + c * 16;
}

// d[m] = own[m] rows^T over H, for the 8 rows at `rows`.
template <class T>
MPLUG2_DEVICE void multiply_rows(float (&d)[kOwnTiles][4], const uint32_t (&own)[kOwnTiles][kHeadSteps][4],
                                 unsigned char* rows) {
  const int lane = threadIdx.x % kWarp;
  MPLUG2_UNROLL
  for (int m = 0; m < kOwnTiles; ++m) MPLUG2_UNROLL
  for (int j = 0; j < 4; ++j) d[m][j] = 0;
  MPLUG2_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t b[4];
    ldmatrix_x4(b, stream_chunk(rows, lane % 8, 4 * i + lane / 8));
    MPLUG2_UNROLL
    for (int j = 0; j < 2; ++j) MPLUG2_UNROLL
    for (int m = 0; m < kOwnTiles; ++m) mma_m16n8k16<T>(d[m], own[m][2 * i + j], b[2 * j], b[2 * j + 1]);
  }
}

// sum[m] += weights[m] rows, for the 16 rows at `rows`.
template <class T>
MPLUG2_DEVICE void add_rows(float (&sum)[kOwnTiles][kHeadChunks][4], const uint32_t (&weights)[kOwnTiles][4],
                            unsigned char* rows) {
  const int lane = threadIdx.x % kWarp;
  MPLUG2_UNROLL
  for (int i = 0; i < kHeadChunks / 2; ++i) {
    uint32_t b[4];
    ldmatrix_x4_transposed(b, stream_chunk(rows, lane % 16, 2 * i + lane / 16));
    MPLUG2_UNROLL
    for (int m = 0; m < kOwnTiles; ++m) {
      mma_m16n8k16<T>(sum[m][2 * i], weights[m], b[0], b[1]);
      mma_m16n8k16<T>(sum[m][2 * i + 1], weights[m], b[2], b[3]);
    }
  }
}

// factor times the sums of `count` rows, the sharers' added in their order, to the rows at `to` or, where there is a
// part, to (rows, H) float32 there; zeros for rows that !has(row). All threads of the block; all of shared memory up to
// kSumsBytes is overwritten.
template <class T, class Has>
MPLUG2_DEVICE void store_sums(T* to, int64_t token, float* part, int count, int sharers,
                              const float (&sum)[kOwnTiles][kHeadChunks][4], float factor, const Has& has) {
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  // (warps, kOwnRows, kSumFloats); the halves of the last four chunks change places, against bank conflicts
  float* sums = reinterpret_cast<float*>(shared_memory());
  __syncthreads();
  MPLUG2_UNROLL
  for (int m = 0; m < kOwnTiles; ++m) MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    float* row = sums + (warp * kOwnRows + m * kTileRows + g + 8 * half) * kSumFloats;
    MPLUG2_UNROLL
    for (int i = 0; i < kHeadChunks; ++i)
      store_pair(row + i * kChunk + (2 * t ^ i / 4 * 4), sum[m][i][2 * half], sum[m][i][2 * half + 1]);
  }
  __syncthreads();
  const int c = threadIdx.x % kHeadChunks;
  for (int r = threadIdx.x / kHeadChunks; r < count; r += kRowsAtOnce) {
    const float* from = sums + (r / kOwnRows * sharers * kOwnRows + r % kOwnRows) * kSumFloats + c * kChunk;
    float total[kChunk] = {};
    for (int w = 0; w < sharers; ++w, from += kOwnRows * kSumFloats) {
      float values[kChunk];
      load_floats(values, from + (c & 4));
      load_floats(values + 4, from + (~c & 4));
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) total[j] += values[j];
    }
    const bool is_kept = has(r);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) total[j] = is_kept ? total[j] * factor : 0;
    if (part == nullptr) {
      store16(to + r * token + c * kChunk, pack_chunk<T>(total));
    } else {
      store_floats(part + r * kHead + c * kChunk, total);
      store_floats(part + r * kHead + c * kChunk + 4, total + 4);
    }
  }
}

template <class T>
struct TiledBwdPartsParams {
  const float* parts;  // (splits, B*N, rows, H)
  Tokens<T> to;        // (B, rows, N, H)
  int64_t part_rows;   // B * N * rows
  int64_t stride;      // floats from a split to the next
  int rows, heads, splits;
};

// to = the sum of the parts, in their order. A thread is a chunk of a row.
template <class T>
MPLUG2_KERNEL(kTiledBwdThreads, 8)
tiled_bwd_parts_kernel(TiledBwdPartsParams<T> p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTiledBwdThreads + threadIdx.x, row = thread / kHeadChunks;
  if (row >= p.part_rows) return;
  float total[kChunk] = {};
  for (int split = 0; split < p.splits; ++split) {
    float values[kChunk];
    load_floats(values, p.parts + split * p.stride + thread * kChunk);
    load_floats(values + 4, p.parts + split * p.stride + thread * kChunk + 4);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) total[j] += values[j];
  }
  const int64_t unit = row / p.rows;
  store16(p.to.at(unit / p.heads, unit % p.heads) + row % p.rows * p.to.token + thread % kHeadChunks * kChunk,
          pack_chunk<T>(total));
}

}  // namespace mplug2::attention
