// Rows of scores become weights, softmax(scale scores) over the keys that are seen: float32 in, each score read once
// and kept in shared memory, each weight written once.
#pragma once
#include "fusion/fusion_row.cuh"

namespace mplug2::fusion {

template <class T>
struct FwdParams {
  const float* scores;  // (gridDim.x, stride)
  const uint8_t* seen;  // (items, stride): 1 where a key is seen, 0 beyond the last one too; or null, for all keys
  T* weights;           // (gridDim.x, stride)
  int64_t first_row;    // of all items' rows
  int rows_of_item;
  int keys;
  int stride;        // keys rounded up to 8; every pointer is aligned to 16 bytes
  float scale_log2;  // scale log2(e)
};

constexpr int kFwdBlocks = 12;  // a multiprocessor

constexpr int64_t fwd_shared_bytes(int64_t stride) { return (stride + 2 * kWarps) * int64_t{sizeof(float)}; }

// Block b takes row b.
template <class T>
MPLUG2_KERNEL(kThreads, kFwdBlocks)
fwd_kernel(FwdParams<T> p) {
  const int64_t row = blockIdx.x;
  const int quads = p.stride / kQuad;
  float* scores = reinterpret_cast<float*>(shared_memory());  // (stride)
  float* tops = scores + p.stride;                            // (kWarps)
  float* sums = tops + kWarps;                                // (kWarps)

  // What a thread copies it reads itself, until the last step: no barrier.
  load_row(scores, p.scores + row * p.stride, p.stride);
  cp_async_commit();
  cp_async_wait<0>();

  // The largest score. Hidden keys, and what is beyond the last key, become -infinity.
  const uint8_t* seen = p.seen == nullptr ? nullptr : p.seen + (p.first_row + row) / p.rows_of_item * p.stride;
  float top = -INFINITY;
  for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
    const uint32_t flags = seen == nullptr ? ~0u : *reinterpret_cast<const uint32_t*>(seen + quad * kQuad);
    float z[kQuad];
    load_floats(z, scores + place(quad));
    MPLUG2_UNROLL
    for (int j = 0; j < kQuad; ++j) {
      const bool is_seen = quad * kQuad + j < p.keys && (flags >> (8 * j) & 1) != 0;
      z[j] = is_seen ? z[j] * p.scale_log2 : -INFINITY;
      top = fmaxf(top, z[j]);
    }
    store_floats(scores + place(quad), z);
  }
  top = block_max(top, tops);

  // Exponentials below it, and their sum.
  const float base = top == -INFINITY ? 0.0f : top;  // not -infinity less -infinity
  float sum = 0;
  for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
    float z[kQuad];
    load_floats(z, scores + place(quad));
    MPLUG2_UNROLL
    for (int j = 0; j < kQuad; ++j) {
      z[j] = exp2_approx(z[j] - base);
      sum += z[j];
    }
    store_floats(scores + place(quad), z);
  }
  sum = block_sum(sum, sums);

  // Weights, a chunk a thread. A row that sees no key: zeros.
  const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  for (int chunk = threadIdx.x; chunk < p.stride / kChunk; chunk += kThreads) {
    float weights[kChunk];
    read_chunk(weights, scores, chunk);
    MPLUG2_UNROLL
    for (int j = 0; j < kChunk; ++j) weights[j] *= inverse;
    store16_once(p.weights + row * p.stride + chunk * kChunk, pack_chunk<T>(weights));  // scores keep the cache
  }
}

}  // namespace mplug2::fusion
