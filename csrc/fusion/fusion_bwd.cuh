// Gradients of weights become gradients of scores, ds = scale w (dw - sum w dw), each number read once. They are
// written beside the weights, row by row in turn: one product then gives the gradient of x by both.
#pragma once
#include "fusion/fusion_row.cuh"

namespace mplug2::fusion {

template <class T>
struct BwdParams {
  const T* weights;       // (gridDim.x, stride), 0 beyond the last key
  const float* dweights;  // (gridDim.x, stride), anything beyond the last key
  T* both;                // (gridDim.x, 2, stride): weights, gradients of scores
  int keys;
  int stride;  // keys rounded up to 8; every pointer is aligned to 16 bytes
  float scale;
};

constexpr int kBwdBlocks = 8;  // a multiprocessor

constexpr int64_t bwd_shared_bytes(int64_t stride) { return stride * 6 + kWarps * int64_t{sizeof(float)}; }

// Block b takes row b.
template <class T>
MPLUG2_KERNEL(kThreads, kBwdBlocks)
bwd_kernel(BwdParams<T> p) {
  const int64_t row = blockIdx.x;
  const int chunks = p.stride / kChunk;
  float* dweights = reinterpret_cast<float*>(shared_memory());  // (stride)
  T* weights = reinterpret_cast<T*>(dweights + p.stride);       // (stride)
  float* sums = reinterpret_cast<float*>(weights + p.stride);   // (kWarps)

  load_row(dweights, p.dweights + row * p.stride, p.stride);
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
    cp_async16(weights + chunk * kChunk, p.weights + row * p.stride + chunk * kChunk);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  // delta = sum w dw
  float delta = 0;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    float w[kChunk], dw[kChunk];
    unpack_chunk<T>(load16(weights + chunk * kChunk), w);
    read_chunk(dw, dweights, chunk);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) delta += chunk * kChunk + j < p.keys ? w[j] * dw[j] : 0.0f;
  }
  delta = block_sum(delta, sums);

  // ds, and the weights along
  T* both = p.both + row * 2 * p.stride;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    const uint4 packed = load16(weights + chunk * kChunk);
    float w[kChunk], dw[kChunk];
    unpack_chunk<T>(packed, w);
    read_chunk(dw, dweights, chunk);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) dw[j] = chunk * kChunk + j < p.keys ? p.scale * w[j] * (dw[j] - delta) : 0.0f;
    store16_once(both + chunk * kChunk, packed);
    store16_once(both + p.stride + chunk * kChunk, pack_chunk<T>(dw));
  }
}

}  // namespace mplug2::fusion
