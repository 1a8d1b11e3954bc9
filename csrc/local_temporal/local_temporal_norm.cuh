// The outer passes of local_temporal, rows of x. Forward: normed = LN(x), and out = x, which the product up is then
// added to. Backward: dx = dout + the gradient of LN, normed again, and the sums over rows of the three vectors that x
// and out meet. The prefix of a frame passes through: there normed is 0, dx = dout, and nothing is summed.
#pragma once
#include "core/row_norm.cuh"

namespace mplug2::local_temporal {

template <class T>
struct NormParams {
  const T* x;       // (rows, width)
  const T* weight;  // (width)
  const T* bias;    // (width)
  T* normed;        // (rows, width)
  T* out;           // (rows, width)
  int rows;
  int width;   // a multiple of 8; every pointer is aligned to 16 bytes
  int tokens;  // of a frame, prefix included
  int prefix;
  float eps;
};

// Blocks a multiprocessor holds, by chunks a lane, which bounds the registers: 24, 32, 36, 40 KB of loads in flight.
constexpr int kNormBlocks[] = {0, 12, 8, 6, 5};

// Weight, bias, and the warps' parts of two sums.
constexpr int norm_shared_bytes(int width) { return 2 * width * 2 + 2 * kRowWarps * 4; }

template <class T, class Layout>
MPLUG2_KERNEL(kRowThreads, kNormBlocks[Layout::kChunks])
norm_kernel(NormParams<T> p) {
  constexpr int kChunks = Layout::kChunks, kLanes = Layout::kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, chunks = p.width / kChunk;
  T* weight = reinterpret_cast<T*>(shared_memory());
  T* bias = weight + p.width;
  float* sums = reinterpret_cast<float*>(bias + p.width);
  load_parameter<Layout>(weight, p.weight, p.width);
  load_parameter<Layout>(bias, p.bias, p.width);
  __syncthreads();

  for (int row = blockIdx.x * Layout::kRows + slot; row < p.rows; row += gridDim.x * Layout::kRows) {
    // The whole row in flight. out and normed are what the products read.
    const int64_t at = static_cast<int64_t>(row) * p.width;
    uint4 x[kChunks];
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) x[i] = load16_once(p.x + at + chunk * kChunk);
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) store16(p.out + at + chunk * kChunk, x[i]);

    // Prefix rows count for nothing, whatever is in them. They take part in the barriers of a row's sums.
    const bool is_prefix = row % p.tokens < p.prefix;
    const RowStats stats = row_stats<T, Layout>(x, lane, chunks, p.eps, sums);
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float values[kChunk], scale[kChunk], shift[kChunk];
        unpack_chunk<T>(x[i], values);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        unpack_chunk<T>(load16(bias + chunk * kChunk), shift);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) values[j] = (values[j] - stats.mean) * stats.rstd * scale[j] + shift[j];
        store16(p.normed + at + chunk * kChunk, is_prefix ? zero_chunk() : pack_chunk<T>(values));
      }
  }
}

template <class T>
struct NormBwdParams {
  const T* dout;    // (rows, width)
  const T* x;       // (rows, width)
  const T* weight;  // (width)
  const T* bias;    // (width)
  T* normed;        // (rows, width): dnormed, and then normed
  T* dx;            // (rows, width)
  float* parts;     // (blocks, kNormSums, width): dweight, dbias and the sum of dout, of each block's rows
  int rows;
  int width;  // a multiple of 8; every pointer is aligned to 16 bytes
  int tokens;
  int prefix;
  float eps;
};

constexpr int kNormSums = 3;
// 36, 48, 54, 48 KB of loads in flight. Three sums of eight numbers a chunk are 96 registers at a width of 1,024.
constexpr int kNormBwdBlocks[] = {0, 6, 4, 3, 2};

// While there are rows, weight, bias and the warps' parts of four sums; then the partial sums of all row slots but one.
template <class Layout>
constexpr int norm_bwd_shared_bytes(int width) {
  const int rows = 2 * width * 2 + 4 * kRowWarps * 4, sums = (Layout::kRows - 1) * width * 4;
  return rows > sums ? rows : sums;
}

template <class T, class Layout>
MPLUG2_KERNEL(kRowThreads, kNormBwdBlocks[Layout::kChunks])
norm_bwd_kernel(NormBwdParams<T> p) {
  constexpr int kChunks = Layout::kChunks, kLanes = Layout::kLanes;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, chunks = p.width / kChunk;
  T* weight = reinterpret_cast<T*>(shared_memory());
  T* bias = weight + p.width;
  float* row_parts = reinterpret_cast<float*>(bias + p.width);
  load_parameter<Layout>(weight, p.weight, p.width);
  load_parameter<Layout>(bias, p.bias, p.width);
  __syncthreads();
  const float inverse_width = 1.0f / static_cast<float>(p.width);
  float dweight[kChunks][kChunk] = {}, dbias[kChunks][kChunk] = {}, dout_sum[kChunks][kChunk] = {};

  for (int row = blockIdx.x * Layout::kRows + slot; row < p.rows; row += gridDim.x * Layout::kRows) {
    const int64_t at = static_cast<int64_t>(row) * p.width;
    if (row % p.tokens < p.prefix) {  // of all lanes of the row
      MPLUG2_UNROLL
      for (int i = 0; i < kChunks; ++i)
        if (const int chunk = lane + i * kLanes; chunk < chunks) {
          store16(p.dx + at + chunk * kChunk, load16_once(p.dout + at + chunk * kChunk));
          store16(p.normed + at + chunk * kChunk, zero_chunk());
        }
      continue;
    }
    uint4 x[kChunks], dnormed[kChunks], dout[kChunks];
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        x[i] = load16_once(p.x + at + chunk * kChunk);
        dnormed[i] = load16(p.normed + at + chunk * kChunk);
        dout[i] = load16_once(p.dout + at + chunk * kChunk);
      }
    const RowStats stats = row_stats<T, Layout>(x, lane, chunks, p.eps, row_parts);

    // normed, the row's part of the sums, mean(g), mean(g y)
    float g_total = 0, gy_total = 0;
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float values[kChunk], dy[kChunk], scale[kChunk], shift[kChunk], normed[kChunk];
        unpack_chunk<T>(x[i], values);
        unpack_chunk<T>(dnormed[i], dy);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        unpack_chunk<T>(load16(bias + chunk * kChunk), shift);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          const float y = (values[j] - stats.mean) * stats.rstd, g = dy[j] * scale[j];
          normed[j] = y * scale[j] + shift[j];
          dweight[i][j] += dy[j] * y;
          dbias[i][j] += dy[j];
          g_total += g;
          gy_total += g * y;
        }
        store16(p.normed + at + chunk * kChunk, pack_chunk<T>(normed));
      }
    const float g_mean = row_sum<Layout>(g_total, row_parts + 2 * kRowWarps) * inverse_width;
    const float gy_mean = row_sum<Layout>(gy_total, row_parts + 3 * kRowWarps) * inverse_width;

    // dx
    MPLUG2_UNROLL
    for (int i = 0; i < kChunks; ++i)
      if (const int chunk = lane + i * kLanes; chunk < chunks) {
        float values[kChunk], dy[kChunk], scale[kChunk], dx[kChunk];
        unpack_chunk<T>(x[i], values);
        unpack_chunk<T>(dnormed[i], dy);
        unpack_chunk<T>(load16(weight + chunk * kChunk), scale);
        unpack_chunk<T>(dout[i], dx);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          const float y = (values[j] - stats.mean) * stats.rstd, g = dy[j] * scale[j];
          dout_sum[i][j] += dx[j];
          dx[j] += stats.rstd * (g - g_mean - y * gy_mean);
        }
        store16(p.dx + at + chunk * kChunk, pack_chunk<T>(dx));
      }
  }

  float* parts = p.parts + static_cast<int64_t>(blockIdx.x) * kNormSums * p.width;
  store_row_sums<Layout>(dweight, parts, chunks);
  store_row_sums<Layout>(dbias, parts + p.width, chunks);
  store_row_sums<Layout>(dout_sum, parts + 2 * p.width, chunks);
}

}  // namespace mplug2::local_temporal
