// With y = (sum - mean) rstd and g = dnormed weight: dx = dsum + rstd (g - mean(g) - y mean(g y)); dweight = the sum of
// dnormed y over the rows, dbias of dnormed. Statistics are made again from sum. Weight gradients take two launches and
// no atomics: a part of each block here, then the parts in order (core/column_sums.cuh), the same bits every time.
#pragma once
#include "core/row_norm.cuh"

namespace mplug2::add_layer_norm {

template <class T>
struct BwdParams {
  const T* dnormed;  // (rows, width)
  const T* dsum;     // (rows, width)
  const T* sum;      // (rows, width)
  const T* weight;   // (width)
  T* dx;             // (rows, width)
  float* parts;      // (blocks, 2, width): dweight and dbias of each block's rows
  int64_t rows;
  int width;  // a multiple of 8; every pointer is aligned to 16 bytes
  float eps;
};

// Blocks a multiprocessor holds on 8.0 and 9.0, by chunks a lane. With 4 warps a block and 3 tensors 48, 60, 72 and 72
// KB of loads are in flight; the registers go to float32 sums of dweight and dbias.
constexpr int kBwdBlocks[] = {0, 8, 5, 4, 3};
// What the compiler is held to: bound to the numbers above, code for 10.0 and 12.0 spills.
constexpr int kBwdMinBlocks[] = {0, 6, 4, 3, 2};

// While there are rows, weight and the warps' parts of four sums; then the partial sums of all row slots but one.
template <class Layout>
constexpr int bwd_shared_bytes(int width) {
  const int rows = width * 2 + 4 * kRowWarps * 4, sums = (Layout::kRows - 1) * width * 4;
  return rows > sums ? rows : sums;
}

template <class T, class Layout>
MPLUG2_KERNEL(kRowThreads, kBwdMinBlocks[Layout::kChunks])
bwd_kernel(BwdParams<T> p) {
  constexpr int kChunks = Layout::kChunks, kLanes = Layout::kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, chunks = p.width / kChunk;
  T* weight = reinterpret_cast<T*>(shared_memory());
  float* row_parts = reinterpret_cast<float*>(weight + p.width);
  load_parameter<Layout>(weight, p.weight, p.width);
  __syncthreads();
  const float inverse_width = 1.0f / static_cast<float>(p.width);
  float dweight[kChunks][kChunk] = {}, dbias[kChunks][kChunk] = {};

  for (int64_t row = static_cast<int64_t>(blockIdx.x) * Layout::kRows + slot; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * Layout::kRows) {
    // The whole row in flight. Nobody reads the three again soon; dx is what the next op reads.
    const int64_t at = row * p.width;
    uint4 sum[kChunks] = {}, dnormed[kChunks] = {}, dsum[kChunks] = {};
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        sum[i] = load16_once(p.sum + at + chunk * kChunk);
        dnormed[i] = load16_once(p.dnormed + at + chunk * kChunk);
        dsum[i] = load16_once(p.dsum + at + chunk * kChunk);
      }

    const RowStats stats = row_stats<T, Layout>(sum, lane, chunks, p.eps, row_parts);

    // the row's part of dweight and dbias, mean(g), mean(g y)
    float g_total = 0, gy_total = 0;
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float s[kChunk], dy[kChunk], scale[kChunk];
        unpack_chunk<T>(sum[i], s);
        unpack_chunk<T>(dnormed[i], dy);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          const float y = (s[j] - stats.mean) * stats.rstd, g = dy[j] * scale[j];
          dweight[i][j] += dy[j] * y;
          dbias[i][j] += dy[j];
          g_total += g;
          gy_total += g * y;
        }
      }
    const float g_mean = row_sum<Layout>(g_total, row_parts + 2 * kRowWarps) * inverse_width;
    const float gy_mean = row_sum<Layout>(gy_total, row_parts + 3 * kRowWarps) * inverse_width;

    // dx
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float s[kChunk], dy[kChunk], scale[kChunk], dx[kChunk];
        unpack_chunk<T>(sum[i], s);
        unpack_chunk<T>(dnormed[i], dy);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        unpack_chunk<T>(dsum[i], dx);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          const float y = (s[j] - stats.mean) * stats.rstd, g = dy[j] * scale[j];
          dx[j] += stats.rstd * (g - g_mean - y * gy_mean);
        }
        store16(p.dx + at + chunk * kChunk, pack_chunk<T>(dx));
      }
  }

  float* parts = p.parts + static_cast<int64_t>(blockIdx.x) * 2 * p.width;
  store_row_sums<Layout>(dweight, parts, chunks);
  store_row_sums<Layout>(dbias, parts + p.width, chunks);
}

}  // namespace mplug2::add_layer_norm
