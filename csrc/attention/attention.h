// Attention kernels for one instruction set. No torch here.
#pragma once
#include <cstdint>

#include "core/bf16.h"

namespace mplug2 {

struct AttentionShape {
  int64_t batch, groups, queries, keys, heads, head_dim;  // B G S K N H
  int64_t total_queries() const { return groups * queries; }
};

// A (rows, tokens, heads, H) tensor read in place; strides in elements, H contiguous.
template <class T>
struct AttentionView {
  const T* data;
  int64_t row, token, head;
};

struct AttentionMask {
  const int64_t* key_lengths;  // (B), or null
  const bool* key_mask;        // (B, K) contiguous, or null
  bool causal;                 // query s sees keys j <= s + K - S
  float scale;
};

// One call works on one head of one row of k and v. Its queries are the G*S rows that read it, i = g * S + s.
template <class T>
struct AttentionKernels {
  // Queries [first, last): out (B*G, S, N, H) contiguous, lse (B*G, N, S) or null.
  void (*fwd)(const AttentionShape&, const AttentionMask&, AttentionView<T> q, AttentionView<T> k, AttentionView<T> v,
              T* out, float* lse, int64_t batch, int64_t head, int64_t first, int64_t last, float* workspace);
  // All queries; dq like q, dk and dv like k and v, contiguous.
  void (*bwd)(const AttentionShape&, const AttentionMask&, AttentionView<T> dout, AttentionView<T> q,
              AttentionView<T> k, AttentionView<T> v, AttentionView<T> out, const float* lse, T* dq, T* dk, T* dv,
              int64_t batch, int64_t head, float* workspace);
};

constexpr int64_t kAttentionKeys = 64;     // keys of a block: with H = 64 its K and V are 32 KB in float32
constexpr int64_t kAttentionQueries = 24;  // queries of a block: their scores are 6 KB

inline int64_t padded_head(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Floats of workspace for `queries` queries.
inline int64_t attention_fwd_workspace(int64_t queries, int64_t head_dim) {
  const int64_t head = padded_head(head_dim);
  return queries * (2 * head + 2) + 2 * kAttentionKeys * head + kAttentionQueries * kAttentionKeys + kAttentionKeys;
}
inline int64_t attention_bwd_workspace(int64_t queries, int64_t head_dim) {
  const int64_t head = padded_head(head_dim);
  return queries * (3 * head + 2) + 16 + 5 * kAttentionKeys * head + 2 * kAttentionQueries * kAttentionKeys +
         kAttentionKeys;
}

#define MPLUG2_DECLARE(isa)                \
  namespace isa {                          \
  template <class T>                       \
  AttentionKernels<T> attention_kernels(); \
  }
MPLUG2_DECLARE(baseline)
MPLUG2_DECLARE(avx2)
MPLUG2_DECLARE(avx512)
#undef MPLUG2_DECLARE

}  // namespace mplug2
