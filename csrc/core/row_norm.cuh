// Layer normalisation of rows held in registers: how a row lies in its warps, sums over it, its statistics. 16-byte
// chunks of eight numbers lie one after the other over the lanes, kChunks of them a lane. Up to 1,024 numbers take one
// warp, which needs no barrier; wider rows a whole block.
#pragma once
#include "core/chunk.cuh"

namespace mplug2 {

constexpr int kRowThreads = 128;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kMaxRowWidth = 4096;

template <int kChunks_, int kWarps_>
struct RowLayout {
  static constexpr int kChunks = kChunks_;            // a lane
  static constexpr int kWarps = kWarps_;              // a row: 1 or kRowWarps
  static constexpr int kLanes = kWarps * kWarp;       // a row
  static constexpr int kRows = kRowThreads / kLanes;  // a block at a time
};

// f(layout) with the smallest layout that holds `width`, a multiple of kChunk up to kMaxRowWidth.
template <class F>
void with_row_layout(int64_t width, F f) {
  if (width <= 256)
    f(RowLayout<1, 1>{});
  else if (width <= 512)
    f(RowLayout<2, 1>{});
  else if (width <= 768)
    f(RowLayout<3, 1>{});
  else if (width <= 1024)
    f(RowLayout<4, 1>{});
  else if (width <= 2048)
    f(RowLayout<2, kRowWarps>{});
  else
    f(RowLayout<4, kRowWarps>{});
}

// `width` numbers of global memory into shared memory, by all threads of the block; there after a barrier.
template <class Layout, class T>
MPLUG2_DEVICE void load_parameter(T* to, const T* from, int width) {
  MPLUG2_UNROLL
  for (int i = 0; i < Layout::kChunks * Layout::kLanes; i += kRowThreads)
    if (const int at = (i + threadIdx.x) * kChunk; at < width) store16(to + at, load16(from + at));
}

// The sum of x over the lanes of a row, the same bits in all of them. `parts` (kRowWarps) in shared memory is this
// sum's own, where a row is a whole block: it is free again after the next barrier, so two sums in turn need two.
template <class Layout>
MPLUG2_DEVICE float row_sum(float x, float* parts) {
  x = warp_sum(x);
  if constexpr (Layout::kWarps == 1) return x;
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  MPLUG2_UNROLL
  for (int warp = 0; warp < Layout::kWarps; ++warp) total += parts[warp];
  return total;
}

struct RowStats {
  float mean;
  float rstd;  // 1 / sqrt(variance + eps)
};

// Of a row in registers, in two passes (mean, then centred squares): digits survive an offset far above the spread.
// `parts` is (2, kRowWarps).
template <class T, class Layout>
MPLUG2_DEVICE RowStats row_stats(const uint4 (&x)[Layout::kChunks], int lane, int chunks, float eps, float* parts) {
  const float inverse_width = 1.0f / static_cast<float>(chunks * kChunk);
  float total = 0;
  MPLUG2_UNROLL
  for (int i = 0; i < Layout::kChunks; ++i)
    if (lane + i * Layout::kLanes < chunks) {
      float values[kChunk];
      unpack_chunk<T>(x[i], values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) total += values[j];
    }
  const float mean = row_sum<Layout>(total, parts) * inverse_width;
  float squares = 0;
  MPLUG2_UNROLL
  for (int i = 0; i < Layout::kChunks; ++i)
    if (lane + i * Layout::kLanes < chunks) {
      float values[kChunk];
      unpack_chunk<T>(x[i], values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) squares += (values[j] - mean) * (values[j] - mean);
    }
  return {mean, rsqrtf(row_sum<Layout>(squares, parts + kRowWarps) * inverse_width + eps)};
}

// The row slots' partial sums added in order of the slots into those of slot 0, and stored to `to` (width). A slot's
// sums lie in shared memory as first halves, then second halves of all chunks: neighbouring lanes on different banks.
template <class Layout>
MPLUG2_DEVICE void store_row_sums(float (&sum)[Layout::kChunks][kChunk], float* to, int chunks) {
  const int slot = threadIdx.x / Layout::kLanes, lane = threadIdx.x % Layout::kLanes;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const auto place = [&](int of_slot, int half, int chunk) {
    return shared + (((of_slot - 1) * 2 + half) * chunks + chunk) * 4;
  };
  if constexpr (Layout::kRows > 1) {
    __syncthreads();  // shared memory is free
    if (slot > 0) {
      MPLUG2_UNROLL
      for (int i = 0; i < Layout::kChunks; ++i)
        if (const int chunk = lane + i * Layout::kLanes; chunk < chunks) {
          store_floats(place(slot, 0, chunk), &sum[i][0]);
          store_floats(place(slot, 1, chunk), &sum[i][4]);
        }
    }
    __syncthreads();
  }
  if (slot > 0) return;
  MPLUG2_UNROLL
  for (int i = 0; i < Layout::kChunks; ++i)
    if (const int chunk = lane + i * Layout::kLanes; chunk < chunks) {
      MPLUG2_UNROLL
      for (int other = 1; other < Layout::kRows; ++other) {
        float addend[kChunk];
        load_floats(&addend[0], place(other, 0, chunk));
        load_floats(&addend[4], place(other, 1, chunk));
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) sum[i][j] += addend[j];
      }
      store_floats(to + chunk * kChunk, &sum[i][0]);
      store_floats(to + chunk * kChunk + 4, &sum[i][4]);
    }
}

}  // namespace mplug2
