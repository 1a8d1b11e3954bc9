// dpre = dout activation'(pre) and dbias = its sum over the rows, in one pass; without an activation the sum alone.
#pragma once
#include "core/activation.cuh"
#include "core/column_sums.cuh"

namespace mplug2::linear {

template <class T>
struct BwdParams {
  const T* dout;  // (rows, width)
  const T* pre;   // (rows, width); not read where the activation is the identity
  T* dpre;        // (rows, width); not written where the activation is the identity
  float* parts;   // (gridDim.y, width): dbias of each block's rows
  int64_t rows;
  int width;  // a multiple of 8; every pointer is aligned to 16 bytes
};

constexpr int kBwdThreads = 256;
constexpr int kBwdBlocks = 3;  // a multiprocessor: 48 KB of loads in flight there
constexpr int kBwdWarps = kBwdThreads / kWarp;
constexpr int kBwdLoads = 2;  // rows of a thread at a time
constexpr int kBwdRows = kBwdWarps * kBwdLoads;

// Block (x, y): 256 columns, every gridDim.y-th 16 rows.
template <class T, class Activation>
MPLUG2_KERNEL(kBwdThreads, kBwdBlocks)
bwd_kernel(BwdParams<T> p) {
  const int column = (blockIdx.x * kWarp + threadIdx.x % kWarp) * kChunk;
  const bool is_valid = column < p.width;
  float sum[kChunk] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kBwdRows + threadIdx.x / kWarp; is_valid && first < p.rows;
       first += static_cast<int64_t>(gridDim.y) * kBwdRows) {
    uint4 dout[kBwdLoads], pre[kBwdLoads];
    MPLUG2_UNROLL
    for (int i = 0; i < kBwdLoads; ++i)
      if (const int64_t row = first + i * kBwdWarps; row < p.rows) {
        dout[i] = load16(p.dout + row * p.width + column);
        if constexpr (!Activation::kIsIdentity) pre[i] = load16_once(p.pre + row * p.width + column);
      }
    MPLUG2_UNROLL
    for (int i = 0; i < kBwdLoads; ++i)
      if (const int64_t row = first + i * kBwdWarps; row < p.rows) {
        float gradient[kChunk];
        unpack_chunk<T>(dout[i], gradient);
        if constexpr (!Activation::kIsIdentity) {
          float z[kChunk];
          unpack_chunk<T>(pre[i], z);
          MPLUG2_UNROLL
          for (int j = 0; j < kChunk; ++j) gradient[j] *= Activation::slope(z[j]);
          store16(p.dpre + row * p.width + column, pack_chunk<T>(gradient));
        }
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) sum[j] += gradient[j];
      }
  }
  store_column_sum<kBwdWarps>(sum, p.parts + static_cast<int64_t>(blockIdx.y) * p.width + column, is_valid);
}

}  // namespace mplug2::linear
