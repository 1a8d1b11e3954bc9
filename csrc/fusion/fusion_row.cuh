// A row of float32 in a block's shared memory, and sums over the block.
#pragma once
#include "core/chunk.cuh"

namespace mplug2::fusion {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kQuad = 4;  // float32 in 16 bytes

// Where a quad of the row lies: neighbouring lanes use different banks whether they take every quad or every other one.
MPLUG2_DEVICE int place(int quad) { return (quad ^ (quad >> 3 & 1)) * kQuad; }

// `length` float32, a multiple of 8, of global memory on their way into shared memory, all in flight.
MPLUG2_DEVICE void load_row(float* to, const float* from, int length) {
  for (int quad = threadIdx.x; quad < length / kQuad; quad += kThreads)
    cp_async16(to + place(quad), from + quad * kQuad);
}

// A chunk of the row.
MPLUG2_DEVICE void read_chunk(float (&to)[kChunk], const float* row, int chunk) {
  load_floats(&to[0], row + place(2 * chunk));
  load_floats(&to[kQuad], row + place(2 * chunk + 1));
}

// The largest or the sum of x over the block, the same bits in all threads. `parts` (kWarps) in shared memory is this
// call's own. A barrier.
MPLUG2_DEVICE float block_max(float x, float* parts) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  MPLUG2_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) x = fmaxf(x, parts[warp]);
  return x;
}
MPLUG2_DEVICE float block_sum(float x, float* parts) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  MPLUG2_UNROLL
  for (int warp = 1; warp < kWarps; ++warp) x += parts[warp];
  return x;
}

}  // namespace mplug2::fusion
