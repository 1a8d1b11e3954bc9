// What attention's kernels share: how tensors lie in memory, 64 numbers of a head in a row of shared memory, and
// fragments of mma.sync read from and written to global memory in accesses of 16 bytes.
#pragma once
#include "core/chunk.cuh"

namespace mplug2::attention {

constexpr int kHead = 64;                    // H
constexpr int kHeadChunks = kHead / kChunk;  // of 16 bytes
constexpr int kHeadSteps = kHead / 16;       // of m16n8k16 over H
constexpr int kRowBytes = kHead * 2;         // of a row in shared memory
constexpr int kTileKeys = 8;                 // n of m16n8k16
constexpr int kTileRows = 16;                // m of m16n8k16
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A (rows, tokens, heads, H) tensor; strides in elements, multiples of 8; H contiguous, data aligned to 16 bytes.
template <class T>
struct Tokens {
  T* data;
  int64_t row, token, head;
  MPLUG2_DEVICE T* at(int64_t r, int64_t h) const { return data + r * row + h * head; }  // (tokens, H), strided
};

constexpr int padded_keys(int keys) { return (keys + kTileKeys - 1) / kTileKeys * kTileKeys; }

// Chunk c of row r of a tile in shared memory. Chunks change places by row, so that eight rows of a column of chunks
// lie in all 32 banks.
MPLUG2_DEVICE unsigned char* chunk_at(unsigned char* tile, int r, int c) {
  return tile + r * kRowBytes + ((c ^ (r % 8)) * 16);
}

// Rows [0, rows) of a head into shared memory, in flight; zeros from `valid` on. A thread keeps to its column of chunks
// and, as it takes every eighth row or fewer, to its place in the swizzle.
template <int kThreads, class T>
MPLUG2_DEVICE void copy_rows(unsigned char* tile, const T* from, int64_t token, int rows, int valid) {
  constexpr int kRowsAtOnce = kThreads / kHeadChunks;
  static_assert(kRowsAtOnce % 8 == 0);
  int r = threadIdx.x / kHeadChunks;
  const int c = threadIdx.x % kHeadChunks;
  unsigned char* to = chunk_at(tile, r, c);
  const T *none = from, *at = from + r * token + c * kChunk;
  for (; r < rows; r += kRowsAtOnce, to += kRowsAtOnce * kRowBytes, at += kRowsAtOnce * token)
    cp_async16(to, r < valid ? at : none, r < valid);
}

// x[i] of lane t of a quad <-> x[t] of lane i.
MPLUG2_DEVICE void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  MPLUG2_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + 1], 1);
    x[i] = odd ? got : x[i];
    x[i + 1] = odd ? x[i + 1] : got;
  }
  MPLUG2_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? x[i] : x[i + 2], 2);
    x[i] = high ? got : x[i];
    x[i + 2] = high ? x[i + 2] : got;
  }
}

// 16 rows of a head from `first` on as the a of mma.sync, zeros from row `end` on.
template <class T>
MPLUG2_DEVICE void load_rows(uint32_t (&a)[kHeadSteps][4], const T* from, int64_t token, int first, int end) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = first + g + 8 * half;
    MPLUG2_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint4 chunk = row < end ? load16(from + row * token + (4 * i + t) * kChunk) : zero_chunk();
      uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
      transpose_quad(words);
      MPLUG2_UNROLL
      for (int j = 0; j < 4; ++j) a[2 * i + j / 2][half + 2 * (j % 2)] = words[j];
    }
  }
}

// The d of eight m16n8 tiles, 16 rows of a head, times a factor for each half of the rows.
template <class T>
MPLUG2_DEVICE void store_rows(T* to, int64_t token, int first, int end, const float (&d)[kHeadChunks][4],
                              const float (&factor)[2]) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  MPLUG2_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = first + g + 8 * half;
    MPLUG2_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t words[4];
      MPLUG2_UNROLL
      for (int j = 0; j < 4; ++j)
        words[j] = pack<T>(d[4 * i + j][2 * half] * factor[half], d[4 * i + j][2 * half + 1] * factor[half]);
      transpose_quad(words);
      if (row < end)
        store16(to + row * token + (4 * i + t) * kChunk, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// Reductions over the four lanes that hold a row of d.
MPLUG2_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
MPLUG2_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace mplug2::attention
