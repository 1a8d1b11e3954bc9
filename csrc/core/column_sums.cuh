// Sums over the rows of a matrix, columns apart, without atomics and always in the same order: each block adds its rows
// and writes a part, a second launch adds the parts. A warp covers 32 chunks of one row, the warps of a block take rows
// in turn, and thread and chunk stay together, so that a sum is a few registers.
#pragma once
#include "core/chunk.cuh"

namespace mplug2 {

// Columns of a warp's width.
constexpr int kWarpColumns = kWarp * kChunk;

// Shared memory of store_column_sum in blocks of `warps` warps.
constexpr int column_sum_shared_bytes(int warps) {
  return (warps - 1) * kWarpColumns * static_cast<int>(sizeof(float));
}

// The warps' sums of a chunk of columns added in order of the warps, and stored by warp 0 to `to` (kChunk; aligned to
// 16 bytes) where is_valid. All threads of the block call it.
template <int kWarps>
MPLUG2_DEVICE void store_column_sum(float (&sum)[kChunk], float* to, bool is_valid) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* shared = reinterpret_cast<float*>(shared_memory());  // (kWarps - 1, 2, kWarp, 4): halves of chunks apart, so
                                                              // that neighbouring lanes use different banks
  const auto place = [&](int of_warp, int half) { return shared + (((of_warp - 1) * 2 + half) * kWarp + lane) * 4; };
  __syncthreads();  // shared memory is free
  if (warp > 0) {
    store_floats(place(warp, 0), &sum[0]);
    store_floats(place(warp, 1), &sum[4]);
  }
  __syncthreads();
  if (warp > 0 || !is_valid) return;
  MPLUG2_UNROLL
  for (int other = 1; other < kWarps; ++other) {
    float addend[kChunk];
    load_floats(&addend[0], place(other, 0));
    load_floats(&addend[4], place(other, 1));
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) sum[j] += addend[j];
  }
  store_floats(to, &sum[0]);
  store_floats(to + 4, &sum[4]);
}

// Where the sums of one set of columns go: element i to to[i * stride].
template <class T>
struct ColumnSumsTo {
  T* to;
  int stride;
};

template <class T, int kSets>
struct SumPartsParams {
  const float* parts;  // (num_parts, kSets, width)
  ColumnSumsTo<T> sets[kSets];
  int num_parts;
  int width;
};

constexpr int kSumPartsThreads = 1024;
constexpr int kSumPartsSharedBytes = kSumPartsThreads * static_cast<int>(sizeof(float));

// Block (x, y) adds columns 32 x and up of set y: warp w parts w, w + 32, ..., then one warp the 32 sums.
template <class T, int kSets>
MPLUG2_KERNEL(kSumPartsThreads, 1)
sum_parts_kernel(SumPartsParams<T, kSets> p) {
  constexpr int kWarps = kSumPartsThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, set = blockIdx.y;
  const int column = blockIdx.x * kWarp + lane;
  float* sums = reinterpret_cast<float*>(shared_memory());  // (kWarps, kWarp)
  float total = 0;
  if (column < p.width)
    for (int part = warp; part < p.num_parts; part += kWarps)
      total += p.parts[(static_cast<int64_t>(part) * kSets + set) * p.width + column];
  sums[warp * kWarp + lane] = total;
  __syncthreads();
  if (warp > 0 || column >= p.width) return;
  MPLUG2_UNROLL
  for (int other = 1; other < kWarps; ++other) total += sums[other * kWarp + lane];
  T* to = p.sets[0].to;
  int stride = p.sets[0].stride;
  MPLUG2_UNROLL
  for (int i = 1; i < kSets; ++i) {  // selected, not indexed: that would take a stack frame
    to = set == i ? p.sets[i].to : to;
    stride = set == i ? p.sets[i].stride : stride;
  }
  to[static_cast<int64_t>(column) * stride] = from_float<T>(total);
}

}  // namespace mplug2
