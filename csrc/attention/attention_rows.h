// Fused attention in float32 arithmetic whatever the dtype: a block of keys is packed once (transposed in registers),
// scores of a few queries live in the first-level cache, and the softmax is carried from block to block (running
// maximum and sum, Milakov and Gimelshein 2018). The backward pass makes the weights again from lse; its five products
// share the packed blocks.
#include "attention/attention.h"
#include "core/block_product.h"

namespace mplug2::MPLUG2_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int64_t kFewQueries = 2 * kTileRows;

// The keys [first, first + kAttentionKeys) of one row of k and v.
struct KeyBlock {
  int64_t first, count;        // count <= kAttentionKeys
  int64_t columns;             // count up to whole vectors: the scores that are made
  float bias[kAttentionKeys];  // 0, or -inf where a key is hidden from every query
  bool hides;                  // some bias is -inf
  bool all_seen;               // of the first `count`
  bool seen(int64_t j) const { return bias[j] == 0.0f; }
};

// Keys from `end` on are hidden from every query of row `batch`.
int64_t keys_end(const AttentionShape& shape, const AttentionMask& mask, int64_t batch) {
  if (mask.key_lengths == nullptr) return shape.keys;
  const int64_t length = mask.key_lengths[batch];
  return length < 0 ? 0 : length < shape.keys ? length : shape.keys;
}

KeyBlock key_block(const AttentionShape& shape, const AttentionMask& mask, int64_t batch, int64_t first, int64_t end) {
  KeyBlock block;
  block.first = first;
  block.count = end - first < kAttentionKeys ? end - first : kAttentionKeys;
  block.columns = (block.count + kLanes - 1) / kLanes * kLanes;
  block.hides = block.count < block.columns;
  block.all_seen = true;
  for (int64_t j = 0; j < block.columns; ++j) {
    const bool seen = j < block.count && (mask.key_mask == nullptr || mask.key_mask[batch * shape.keys + first + j]);
    block.bias[j] = seen ? 0.0f : kMinusInfinity;
    block.hides = block.hides || !seen;
    block.all_seen = block.all_seen && (seen || j >= block.count);
  }
  return block;
}

// The last key that query i sees by causality.
int64_t last_key(const AttentionShape& shape, const AttentionMask& mask, int64_t i) {
  return mask.causal ? i % shape.queries + shape.keys - shape.queries : shape.keys - 1;
}

template <class T>
const T* query_row(const AttentionShape& shape, const AttentionView<T>& q, int64_t batch, int64_t head, int64_t i) {
  return q.data + (batch * shape.groups + i / shape.queries) * q.row + i % shape.queries * q.token + head * q.head;
}
int64_t lse_index(const AttentionShape& shape, int64_t batch, int64_t head, int64_t i) {
  return ((batch * shape.groups + i / shape.queries) * shape.heads + head) * shape.queries + i % shape.queries;
}

// out[0..padded) = scale * row, zero beyond H.
template <class T>
MPLUG2_INLINE void widen_row(const T* row, float scale, float* out, int64_t head_dim, int64_t padded) {
  for_lanes(head_dim, [&](int64_t h, auto lanes) { store(out + h, scale * load(row + h, lanes), lanes); });
  for (int64_t h = head_dim; h < padded; ++h) out[h] = 0.0f;
}

// Rows of keys (columns, padded); hidden keys are zero, whatever lies in memory.
template <class T>
void pack_rows(const AttentionShape& shape, const AttentionView<T>& k, const KeyBlock& block, int64_t batch,
               int64_t head, float* out, int64_t padded) {
  const T* rows = k.data + batch * k.row + block.first * k.token + head * k.head;
  for (int64_t j = 0; j < block.columns; ++j) {
    if (block.seen(j))
      widen_row(rows + j * k.token, 1.0f, out + j * padded, shape.head_dim, padded);
    else
      std::memset(out + j * padded, 0, padded * sizeof(float));
  }
}

// The same, transposed: (padded, kAttentionKeys). On the way asks for the next block's rows and for this one's of
// `soon`: hardware does not look past the end of a page.
template <class T>
void pack_columns(const AttentionShape& shape, const AttentionView<T>& k, const KeyBlock& block, int64_t batch,
                  int64_t head, float* out, int64_t padded, const AttentionView<T>& soon) {
  const T* rows = k.data + batch * k.row + block.first * k.token + head * k.head;
  const T* soon_rows = soon.data + batch * soon.row + block.first * soon.token + head * soon.head;
  for (int64_t j = 0; j < block.columns; j += kLanes) {
    for (int64_t h = 0; h < padded; h += kLanes) {
      Vec square[kLanes];
      const T* row = rows + j * k.token + h;
      const int64_t left = shape.head_dim - h;
      if (block.all_seen && j + kLanes <= block.count && left >= kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = load(row + r * k.token, Whole{});
      } else {
        for (int r = 0; r < kLanes; ++r)
          square[r] = !block.seen(j + r) || left <= 0 ? Vec{}
                      : left >= kLanes                ? load(row + r * k.token, Whole{})
                                                      : load(row + r * k.token, Part{static_cast<int>(left)});
      }
      if (h % (64 / sizeof(T)) == 0) {
        for (int r = 0; r < kLanes; ++r) {
          __builtin_prefetch(row + (kAttentionKeys + r) * k.token, 0, 2);
          __builtin_prefetch(soon_rows + (j + r) * soon.token + h, 0, 2);
        }
      }
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(out + (h + r) * kAttentionKeys + j, square[r], Whole{});
    }
  }
}

MPLUG2_INLINE VecInt lane_index() {
  VecInt index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// f(j, scores) over a row of scores with hidden keys at -inf.
template <class F>
MPLUG2_INLINE void for_scores(const float* scores, const KeyBlock& block, int64_t last, F f) {
  const bool cut = last < block.first + block.count - 1;
  for (int64_t j = 0; j < block.columns; j += kLanes) {
    Vec v = load(scores + j, Whole{});
    if (block.hides) v += load(block.bias + j, Whole{});
    if (cut) v = lane_index() > static_cast<int32_t>(last - block.first - j) ? splat(kMinusInfinity) : v;
    f(j, v);
  }
}

template <class T>
void attention_fwd(const AttentionShape& shape, const AttentionMask& mask, AttentionView<T> q, AttentionView<T> k,
                   AttentionView<T> v, T* out, float* lse, int64_t batch, int64_t head, int64_t first, int64_t last,
                   float* workspace) {
  const int64_t padded = padded_head(shape.head_dim), rows = last - first;
  float* queries = workspace;                                 // (rows, padded), times scale
  float* totals = queries + rows * padded;                    // (rows, padded): sums of weights times values
  float* tops = totals + rows * padded;                       // (rows): largest score so far
  float* sums = tops + rows;                                  // (rows): sums of exponentials below it
  float* key_columns = sums + rows;                           // (padded, kAttentionKeys)
  float* value_rows = key_columns + kAttentionKeys * padded;  // (kAttentionKeys, padded)
  float* scores = value_rows + kAttentionKeys * padded;       // (kAttentionQueries, kAttentionKeys)

  int64_t end = 0;
  for (int64_t i = 0; i < rows; ++i) {
    widen_row(query_row(shape, q, batch, head, first + i), mask.scale, queries + i * padded, shape.head_dim, padded);
    tops[i] = kMinusInfinity;
    sums[i] = 0.0f;
    const int64_t seen = last_key(shape, mask, first + i) + 1;
    end = seen > end ? seen : end;
  }
  std::memset(totals, 0, rows * padded * sizeof(float));
  const int64_t keys = keys_end(shape, mask, batch);
  if (keys < end) end = keys;

  for (int64_t start = 0; start < end; start += kAttentionKeys) {
    const KeyBlock block = key_block(shape, mask, batch, start, end);
    pack_columns(shape, k, block, batch, head, key_columns, padded, v);
    // Values that few queries read are not worth packing.
    const bool in_place = rows <= kFewQueries && block.all_seen && shape.head_dim == padded;
    if (!in_place) pack_rows(shape, v, block, batch, head, value_rows, padded);
    for (int64_t row = 0; row < rows; row += kAttentionQueries) {
      const int64_t count = rows - row < kAttentionQueries ? rows - row : kAttentionQueries;
      block_product({queries + row * padded, padded, 1}, key_columns, kAttentionKeys, scores, kAttentionKeys, count,
                    block.columns, padded, false);
      for (int64_t i = 0; i < count; ++i) {
        float* weights = scores + i * kAttentionKeys;
        const int64_t limit = last_key(shape, mask, first + row + i);
        Vec tallest = splat(kMinusInfinity);
        for_scores(weights, block, limit, [&](int64_t j, Vec s) {
          store(weights + j, s, Whole{});
          tallest = larger(s, tallest);
        });
        const float before = tops[row + i], block_top = largest(tallest);
        const float top = block_top > before ? block_top : before;
        // No key yet: -inf - -inf must not happen. Weights are then exp(-inf - 0) = 0.
        const float base = top == kMinusInfinity ? 0.0f : top;
        Vec total{};
        for (int64_t j = 0; j < block.columns; j += kLanes) {
          const Vec w = exp_negative(load(weights + j, Whole{}) - base);
          total += w;
          store(weights + j, w, Whole{});
        }
        const float shrink = top == before ? 1.0f : __builtin_expf(before - base);
        tops[row + i] = top;
        sums[row + i] = sums[row + i] * shrink + sum(total);
        if (shrink != 1.0f) {
          float* old = totals + (row + i) * padded;
          for (int64_t h = 0; h < padded; h += kLanes) store(old + h, shrink * load(old + h, Whole{}), Whole{});
        }
      }
      const BlockA weights{scores, kAttentionKeys, 1};
      float* sums_row = totals + row * padded;
      if (in_place)
        block_product(weights, v.data + batch * v.row + start * v.token + head * v.head, v.token, sums_row, padded,
                      count, padded, block.count, true);
      else
        block_product(weights, value_rows, padded, sums_row, padded, count, padded, block.count, true);
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    T* result = out + ((batch * shape.total_queries() + first + i) * shape.heads + head) * shape.head_dim;
    const float inverse = sums[i] > 0.0f ? 1.0f / sums[i] : sums[i] == 0.0f ? 0.0f : sums[i];
    for_lanes(shape.head_dim,
              [&](int64_t h, auto lanes) { store(result + h, inverse * load(totals + i * padded + h, lanes), lanes); });
    if (lse != nullptr) lse[lse_index(shape, batch, head, first + i)] = tops[i] + __builtin_logf(sums[i]);
  }
}

template <class T>
void attention_bwd(const AttentionShape& shape, const AttentionMask& mask, AttentionView<T> dout, AttentionView<T> q,
                   AttentionView<T> k, AttentionView<T> v, AttentionView<T> out, const float* lse, T* dq, T* dk, T* dv,
                   int64_t batch, int64_t head, float* workspace) {
  const int64_t padded = padded_head(shape.head_dim), rows = shape.total_queries(),
                block_size = kAttentionKeys * padded;
  float* queries = workspace;                  // (rows, padded), times scale
  float* douts = queries + rows * padded;      // (rows, padded)
  float* dqueries = douts + rows * padded;     // (rows, padded)
  float* deltas = dqueries + rows * padded;    // (rows, to whole vectors): sum of dout out
  float* bases = deltas + rows + 16;           // (rows): lse, +inf for a query without keys: its weights are exp(-inf)
  float* key_rows = bases + rows;              // (kAttentionKeys, padded)
  float* key_columns = key_rows + block_size;  // (padded, kAttentionKeys)
  float* value_columns = key_columns + block_size;  // (padded, kAttentionKeys)
  float* dkeys = value_columns + block_size;        // (kAttentionKeys, padded)
  float* dvalues = dkeys + block_size;              // (kAttentionKeys, padded)
  float* weights = dvalues + block_size;            // (kAttentionQueries, kAttentionKeys)
  float* dscores = weights + kAttentionQueries * kAttentionKeys;

  for (int64_t i = 0; i < rows; ++i) {
    widen_row(query_row(shape, q, batch, head, i), mask.scale, queries + i * padded, shape.head_dim, padded);
    widen_row(query_row(shape, dout, batch, head, i), 1.0f, douts + i * padded, shape.head_dim, padded);
    widen_row(query_row(shape, out, batch, head, i), 1.0f, dqueries + i * padded, shape.head_dim, padded);
    const float base = lse[lse_index(shape, batch, head, i)];
    bases[i] = base == kMinusInfinity ? -kMinusInfinity : base;
  }
  // In the order of the products below, so that a query with one key has dweight - delta = 0 exactly.
  row_products(douts, dqueries, padded, rows, deltas);
  std::memset(dqueries, 0, rows * padded * sizeof(float));
  const int64_t end = keys_end(shape, mask, batch), token = shape.heads * shape.head_dim;

  for (int64_t start = 0; start < shape.keys; start += kAttentionKeys) {
    std::memset(dkeys, 0, 2 * block_size * sizeof(float));
    if (start < end) {
      const KeyBlock block = key_block(shape, mask, batch, start, end);
      pack_rows(shape, k, block, batch, head, key_rows, padded);
      pack_columns(shape, k, block, batch, head, key_columns, padded, v);
      pack_columns(shape, v, block, batch, head, value_columns, padded, v);
      for (int64_t row = 0; row < rows; row += kAttentionQueries) {
        const int64_t count = rows - row < kAttentionQueries ? rows - row : kAttentionQueries;
        block_product({queries + row * padded, padded, 1}, key_columns, kAttentionKeys, weights, kAttentionKeys, count,
                      block.columns, padded, false);
        block_product({douts + row * padded, padded, 1}, value_columns, kAttentionKeys, dscores, kAttentionKeys, count,
                      block.columns, padded, false);
        for (int64_t i = 0; i < count; ++i) {
          float* weight_row = weights + i * kAttentionKeys;
          float* dscore_row = dscores + i * kAttentionKeys;
          for_scores(weight_row, block, last_key(shape, mask, row + i), [&](int64_t j, Vec s) {
            const Vec w = exp_negative(s - bases[row + i]);
            store(weight_row + j, w, Whole{});
            store(dscore_row + j, w * (load(dscore_row + j, Whole{}) - deltas[row + i]), Whole{});
          });
        }
        block_product({weights, 1, kAttentionKeys}, douts + row * padded, padded, dvalues, padded, block.count, padded,
                      count, true);
        block_product({dscores, 1, kAttentionKeys}, queries + row * padded, padded, dkeys, padded, block.count, padded,
                      count, true);
        block_product({dscores, kAttentionKeys, 1}, key_rows, padded, dqueries + row * padded, padded, count, padded,
                      block.count, true);
      }
    }
    for (int64_t j = 0; j < kAttentionKeys && start + j < shape.keys; ++j) {
      const int64_t at = (batch * shape.keys + start + j) * token + head * shape.head_dim;
      for_lanes(shape.head_dim, [&](int64_t h, auto lanes) {
        store(dk + at + h, load(dkeys + j * padded + h, lanes), lanes);
        store(dv + at + h, load(dvalues + j * padded + h, lanes), lanes);
      });
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    T* result = dq + (batch * shape.total_queries() + i) * token + head * shape.head_dim;
    for_lanes(shape.head_dim, [&](int64_t h, auto lanes) {
      store(result + h, mask.scale * load(dqueries + i * padded + h, lanes), lanes);
    });
  }
}

}  // namespace

template <class T>
AttentionKernels<T> attention_kernels() {
  return {attention_fwd<T>, attention_bwd<T>};
}
template AttentionKernels<float> attention_kernels();
template AttentionKernels<Bf16> attention_kernels();

}  // namespace mplug2::MPLUG2_ISA
