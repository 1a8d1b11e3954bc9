// sum = x + residual, rounded to its dtype; normed = (sum - mean) / sqrt(variance + eps) weight + bias. A row is read
// once and stays in registers (core/row_norm.cuh).
#pragma once
#include "core/row_norm.cuh"

namespace mplug2::add_layer_norm {

template <class T>
struct FwdParams {
  const T* x;         // (rows, width)
  const T* residual;  // (rows, width)
  const T* weight;    // (width)
  const T* bias;      // (width)
  T* normed;          // (rows, width)
  T* sum;             // (rows, width)
  int64_t rows;
  int width;  // a multiple of 8; every pointer is aligned to 16 bytes
  float eps;
};

// Blocks a multiprocessor holds, by chunks a lane, which bounds the registers of a thread. Memory latency wants 32 KB
// and more of loads in flight there: these have, with 4 warps a block and 2 tensors, 48, 80, 108 and 128 KB.
constexpr int kFwdBlocks[] = {0, 12, 10, 9, 8};

// Weight, bias, and the warps' parts of a row's two sums.
constexpr int fwd_shared_bytes(int width) { return 2 * width * 2 + 2 * kRowWarps * 4; }

template <class T, class Layout>
MPLUG2_KERNEL(kRowThreads, kFwdBlocks[Layout::kChunks])
fwd_kernel(FwdParams<T> p) {
  constexpr int kChunks = Layout::kChunks, kLanes = Layout::kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, chunks = p.width / kChunk;
  T* weight = reinterpret_cast<T*>(shared_memory());
  T* bias = weight + p.width;
  float* row_parts = reinterpret_cast<float*>(bias + p.width);

  // Weight and bias once a block. In registers the compiler would unpack them ahead of the loop, and spill.
  load_parameter<Layout>(weight, p.weight, p.width);
  load_parameter<Layout>(bias, p.bias, p.width);
  __syncthreads();

  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Layout::kRows + slot; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * Layout::kRows) {
    // The whole row in flight. Nobody reads x and residual again soon; sum and normed are what the next op reads.
    const int64_t at = row * p.width;
    uint4 x[kChunks] = {}, residual[kChunks] = {};
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        x[i] = load16_once(p.x + at + chunk * kChunk);
        residual[i] = load16_once(p.residual + at + chunk * kChunk);
      }

    // sum, rounded: what is normalised is what is stored
    uint4 sum[kChunks] = {};
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float values[kChunk], addend[kChunk];
        unpack_chunk<T>(x[i], values);
        unpack_chunk<T>(residual[i], addend);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) values[j] += addend[j];
        sum[i] = pack_chunk<T>(values);
        store16(p.sum + at + chunk * kChunk, sum[i]);
      }

    // normed
    const RowStats stats = row_stats<T, Layout>(sum, lane, chunks, p.eps, row_parts);
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float values[kChunk], scale[kChunk], shift[kChunk];
        unpack_chunk<T>(sum[i], values);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        unpack_chunk<T>(load16(bias + chunk * kChunk), shift);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) values[j] = (values[j] - stats.mean) * stats.rstd * scale[j] + shift[j];
        store16(p.normed + at + chunk * kChunk, pack_chunk<T>(values));
      }
  }
}

}  // namespace mplug2::add_layer_norm
