// loss and log sum exp of rows of logits, each read once: every thread keeps the largest logit that it has seen and the
// sum of exponentials below it, which is rescaled where a larger one comes.
#pragma once
#include "core/activation.cuh"
#include "core/chunk.cuh"

namespace mplug2::linear_cross_entropy {

template <class T>
struct FwdParams {
  const T* logits;         // (rows, stride), without the bias
  const T* bias;           // (stride), or null
  const int64_t* targets;  // (rows)
  float* loss;             // (rows)
  float* lse;              // (rows)
  int vocabulary;
  int64_t stride;  // a multiple of 8, from vocabulary; every pointer but targets, loss and lse is aligned to 16 bytes
  int64_t ignore_index;
  float label_smoothing;
};

constexpr int kFwdThreads = 256;
constexpr int kFwdBlocks = 4;  // a multiprocessor: 64 KB of loads in flight
constexpr int kFwdLoads = 4;   // a thread
constexpr int kFwdWarps = kFwdThreads / kWarp;

// Sum of exponentials of what a thread saw, below the largest.
struct Exponentials {
  float top, sum;

  // Below `to`, at least the own one. -infinity (nothing seen, or nothing larger) adds nothing, not NaN.
  MPLUG2_DEVICE float below(float to) const { return top == to ? sum : sum * exp_approx(top - to); }
};

// Block b takes row b.
template <class T>
MPLUG2_KERNEL(kFwdThreads, kFwdBlocks)
fwd_kernel(FwdParams<T> p) {
  const int64_t row = blockIdx.x, target = p.targets[row];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* tops = reinterpret_cast<float*>(shared_memory());  // (kFwdWarps), as the next two
  float* sums = tops + kFwdWarps;
  float* totals = sums + kFwdWarps;
  float* at_target = totals + kFwdWarps;
  if (threadIdx.x == 0) *at_target = __int_as_float(0x7fffffff);  // NaN, which a target out of range leaves there
  __syncthreads();

  const T* logits = p.logits + row * p.stride;
  const int chunks = (p.vocabulary + kChunk - 1) / kChunk;
  Exponentials seen{-INFINITY, 0.0f};
  float total = 0;
  for (int first = threadIdx.x; first < chunks; first += kFwdLoads * kFwdThreads) {
    uint4 packed[kFwdLoads];
    MPLUG2_UNROLL
    for (int i = 0; i < kFwdLoads; ++i)
      if (const int chunk = first + i * kFwdThreads; chunk < chunks) packed[i] = load16_once(logits + chunk * kChunk);
    MPLUG2_UNROLL
    for (int i = 0; i < kFwdLoads; ++i)
      if (const int chunk = first + i * kFwdThreads; chunk < chunks) {
        float z[kChunk], bias[kChunk];
        unpack_chunk<T>(packed[i], z);
        unpack_chunk<T>(p.bias == nullptr ? zero_chunk() : load16(p.bias + chunk * kChunk), bias);
        const int left = p.vocabulary - chunk * kChunk;  // in the row from this chunk on
        float top = seen.top;
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          z[j] += bias[j];
          total += j < left ? z[j] : 0.0f;
          z[j] = j < left ? z[j] : -INFINITY;
          top = fmaxf(top, z[j]);
        }
        const float base = top == -INFINITY ? 0.0f : top;  // not -infinity less -infinity
        float sum = seen.below(top);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) sum += exp_approx(z[j] - base);
        if (target >= 0 && target < p.vocabulary && target / kChunk == chunk) {
          float hit = z[0];
          MPLUG2_UNROLL
          for (int j = 1; j < kChunk; ++j) hit = target % kChunk == j ? z[j] : hit;
          *at_target = hit;
        }
        seen = {top, sum};
      }
  }

  // Over the warp, then over the warps.
  const float warp_top = warp_max(seen.top), below = warp_sum(seen.below(warp_top));
  total = warp_sum(total);
  if (lane == 0) {
    tops[warp] = warp_top;
    sums[warp] = below;
    totals[warp] = total;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float top = tops[0], sum = 0;
  for (int i = 1; i < kFwdWarps; ++i) top = fmaxf(top, tops[i]);
  total = 0;
  for (int i = 0; i < kFwdWarps; ++i) {
    sum += Exponentials{tops[i], sums[i]}.below(top);
    total += totals[i];
  }
  const float log_sum = logf(sum), a = p.label_smoothing;  // of exponentials below the largest logit
  p.lse[row] = top + log_sum;
  // Differences of logits, not of lse: nothing is lost where logits are large.
  float loss = log_sum + (1.0f - a) * (top - *at_target);
  if (a != 0.0f) loss += a * (top - total / static_cast<float>(p.vocabulary));
  p.loss[row] = target == p.ignore_index ? 0.0f : loss;
}

constexpr int kFwdSharedBytes = (3 * kFwdWarps + 1) * static_cast<int>(sizeof(float));

}  // namespace mplug2::linear_cross_entropy
