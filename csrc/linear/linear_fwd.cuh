// out = activation(pre) + residual, in one pass over the product.
#pragma once
#include "core/chunk.cuh"
#include "linear/linear_epilogue.cuh"

namespace mplug2::linear {

template <class T>
struct FwdParams {
  const T* pre;       // (chunks, 8); may be out
  const T* residual;  // (chunks, 8), or null
  T* out;             // (chunks, 8)
  int64_t chunks;     // every pointer is aligned to 16 bytes
};

// A block of 256 threads takes 1,024 chunks at a time, so that a thread has four loads a tensor in flight: 64 KB and
// more a multiprocessor.
constexpr int kFwdThreads = 256;
constexpr int kFwdBlocks = 4;  // a multiprocessor
constexpr int kFwdLoads = 4;   // a thread
constexpr int kFwdTile = kFwdThreads * kFwdLoads;

template <class T, class Activation>
MPLUG2_KERNEL(kFwdThreads, kFwdBlocks)
fwd_kernel(FwdParams<T> p) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kFwdTile + threadIdx.x; first < p.chunks;
       first += static_cast<int64_t>(gridDim.x) * kFwdTile) {
    uint4 pre[kFwdLoads], residual[kFwdLoads];
    MPLUG2_UNROLL
    for (int i = 0; i < kFwdLoads; ++i)
      if (const int64_t chunk = first + i * kFwdThreads; chunk < p.chunks) {
        pre[i] = load16_once(p.pre + chunk * kChunk);
        residual[i] = p.residual == nullptr ? zero_chunk() : load16_once(p.residual + chunk * kChunk);
      }
    MPLUG2_UNROLL
    for (int i = 0; i < kFwdLoads; ++i)
      if (const int64_t chunk = first + i * kFwdThreads; chunk < p.chunks) {
        float z[kChunk], addend[kChunk];
        unpack_chunk<T>(pre[i], z);
        unpack_chunk<T>(residual[i], addend);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) z[j] = finish<Activation>(z[j], addend[j]);
        store16(p.out + chunk * kChunk, pack_chunk<T>(z));
      }
  }
}

}  // namespace mplug2::linear
