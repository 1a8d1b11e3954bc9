// Logits of some columns become their gradient in place, dloss (exp(z - lse) - (1 - a) onehot - a / V), and are summed
// over the rows for the bias. lse is known, so columns need nothing of each other.
#pragma once
#include "core/activation.cuh"
#include "core/column_sums.cuh"

namespace mplug2::linear_cross_entropy {

template <class T>
struct BwdParams {
  T* logits;               // (rows, stride), without the bias
  const T* bias;           // of the first column on, or null
  const int64_t* targets;  // (rows)
  const float* dloss;      // (rows)
  const float* lse;        // (rows)
  float* parts;            // (gridDim.y, parts_stride): sums of each block's rows
  int64_t rows;
  int first_column;  // in the vocabulary
  int columns;
  int64_t stride;        // a multiple of 8, from columns
  int64_t parts_stride;  // every pointer but targets, dloss and lse is aligned to 16 bytes
  int vocabulary;
  int64_t ignore_index;
  float label_smoothing;
};

constexpr int kBwdThreads = 256;
constexpr int kBwdBlocks = 2;  // a multiprocessor: 32 KB of loads in flight there; three spill on 10.0
constexpr int kBwdWarps = kBwdThreads / kWarp;
constexpr int kBwdLoads = 4;  // rows of a thread at a time
constexpr int kBwdRows = kBwdWarps * kBwdLoads;

// Block (x, y): 256 columns, every gridDim.y-th 32 rows.
template <class T>
MPLUG2_KERNEL(kBwdThreads, kBwdBlocks)
bwd_kernel(BwdParams<T> p) {
  const int column = (blockIdx.x * kWarp + threadIdx.x % kWarp) * kChunk;
  const bool is_valid = column < p.columns;
  const int left = p.columns - column;
  const float a = p.label_smoothing, uniform = a / static_cast<float>(p.vocabulary);
  float bias[kChunk] = {}, sum[kChunk] = {};
  if (is_valid && p.bias != nullptr) unpack_chunk<T>(load16(p.bias + column), bias);

  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kBwdRows + threadIdx.x / kWarp; is_valid && first < p.rows;
       first += static_cast<int64_t>(gridDim.y) * kBwdRows) {
    uint4 logits[kBwdLoads];
    MPLUG2_UNROLL
    for (int i = 0; i < kBwdLoads; ++i)
      if (const int64_t row = first + i * kBwdWarps; row < p.rows)
        logits[i] = load16(p.logits + row * p.stride + column);
    MPLUG2_UNROLL
    for (int i = 0; i < kBwdLoads; ++i)
      if (const int64_t row = first + i * kBwdWarps; row < p.rows) {
        const int64_t target = p.targets[row];
        const bool is_ignored = target == p.ignore_index, is_legal = target >= 0 && target < p.vocabulary;
        const float scale = is_legal ? p.dloss[row] : __int_as_float(0x7fffffff);  // NaN, as the loss is
        const float lse = p.lse[row];
        float z[kChunk];
        unpack_chunk<T>(logits[i], z);
        MPLUG2_UNROLL
        for (int j = 0; j < kChunk; ++j) {
          const float hot = target == p.first_column + column + j ? 1.0f - a : 0.0f;
          const float gradient = scale * (exp_approx(z[j] + bias[j] - lse) - uniform - hot);
          z[j] = is_ignored || j >= left ? 0.0f : gradient;
          sum[j] += z[j];
        }
        store16(p.logits + row * p.stride + column, pack_chunk<T>(z));
      }
  }
  store_column_sum<kBwdWarps>(sum, p.parts + static_cast<int64_t>(blockIdx.y) * p.parts_stride + column, is_valid);
}

struct AddParams {
  const float* part;  // (count, 4)
  float* total;       // (count, 4)
  int64_t count;      // every pointer is aligned to 16 bytes
};

constexpr int kAddThreads = 256;
constexpr int kAddBlocks = 8;  // a multiprocessor: 64 KB of loads in flight

// total += part
static MPLUG2_KERNEL(kAddThreads, kAddBlocks) add_kernel(AddParams p) {
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x; at < p.count;
       at += static_cast<int64_t>(gridDim.x) * kAddThreads) {
    float part[4], total[4];
    load_floats(part, p.part + at * 4);
    load_floats(total, p.total + at * 4);
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) total[j] += part[j];
    store_floats(p.total + at * 4, total);
  }
}

}  // namespace mplug2::linear_cross_entropy
