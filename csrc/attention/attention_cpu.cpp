// Attention on the CPU by ATen's fused kernel, which never holds the scores. Ours are the layout (the G rows of q that share a row of
// k and v become G*S queries of it, so nothing is copied per group; packed projections are read in place), the masks, and queries
// without keys.
#include <cmath>
#include <limits>
#include <vector>

#include "attention/attention_host.h"
#include "core/dispatcher.h"
#include "core/rows.h"

namespace mplug2 {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// (B*G, S, N, H) -> (B, N, G*S, H), a view where strides allow it; the last dimension is made contiguous.
Tensor fold(const Tensor& t, const AttentionShape& shape) {
  Tensor folded = torch::stable::reshape(t, {shape.batch, shape.groups * shape.queries, shape.heads, shape.head_dim});
  if (folded.stride(3) != 1) folded = torch::stable::contiguous(folded);
  return torch::stable::transpose(folded, 1, 2);
}
Tensor keys_first(const Tensor& t) {
  return torch::stable::transpose(t.stride(3) == 1 ? t : torch::stable::contiguous(t), 1, 2);
}

// (B, N, G*S, H) -> (B*G, S, N, H)
Tensor unfold(const Tensor& t, const AttentionShape& shape) {
  return torch::stable::reshape(torch::stable::transpose(t, 1, 2),
                                {shape.batch * shape.groups, shape.queries, shape.heads, shape.head_dim});
}

// What is added to the scores: 0 or -inf, (B, 1, 1 or G*S, K); nothing where every query sees every key, or where
// `is_causal` says it all. empty[b * G*S + i] is set for queries without a key, if there are any.
struct Mask {
  std::optional<Tensor> added;
  bool is_causal = false;
  std::vector<char> empty;

  Mask(const AttentionShape& shape, const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& key_mask,
       bool causal, ScalarType dtype) {
    causal = causal && shape.queries > 1;  // a single query is the last and sees every key
    if (!key_lengths && !key_mask && !causal) return;
    if (!key_lengths && !key_mask && shape.groups == 1 && shape.queries == shape.keys) {
      is_causal = true;
      return;
    }
    const Tensor lengths =
        key_lengths ? torch::stable::contiguous(to_dtype(*key_lengths, ScalarType::Long)) : Tensor();
    const Tensor allowed = key_mask ? torch::stable::contiguous(*key_mask) : Tensor();
    const int64_t total = shape.groups * shape.queries, rows = causal ? total : 1;
    Tensor mask = torch::stable::empty({shape.batch, 1, rows, shape.keys}, ScalarType::Float);
    float* out = mutable_data<float>(mask);
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t length = key_lengths ? data<int64_t>(lengths)[b] : shape.keys;
      const bool* mask_row = key_mask ? data<bool>(allowed) + b * shape.keys : nullptr;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t last = causal ? row % shape.queries + shape.keys - shape.queries : shape.keys - 1;
        bool any = false;
        for (int64_t j = 0; j < shape.keys; ++j) {
          const bool seen = j < length && j <= last && (mask_row == nullptr || mask_row[j]);
          any = any || seen;
          *out++ = seen ? 0.0f : kMinusInfinity;
        }
        if (any) continue;
        // The fused kernel gets a row that it can normalise; its result is replaced afterwards.
        std::fill(out - shape.keys, out, 0.0f);
        if (empty.empty()) empty.resize(shape.batch * total);
        std::fill_n(empty.begin() + b * total + row, causal ? 1 : total, 1);
      }
    }
    added = to_dtype(mask, dtype);
  }
};

// Sets the rows of `t` (B, G*S, rest...) whose query has no key.
template <class T>
void set_empty(const Mask& mask, const Tensor& t, int64_t rest, T value) {
  T* rows = mutable_data<T>(t);
  for (size_t row = 0; row < mask.empty.size(); ++row)
    if (mask.empty[row]) std::fill_n(rows + row * rest, rest, value);
}
void zero_empty(const Mask& mask, const Tensor& t, int64_t rest) {
  if (t.scalar_type() == ScalarType::Float)
    set_empty(mask, t, rest, 0.0f);
  else
    set_empty(mask, t, rest, Bf16{0});
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> key_lengths,
                                         std::optional<Tensor> key_mask, bool causal, double scale, bool return_lse) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  if (!has_kernel(q) || q.numel() == 0 || shape.keys == 0)
    return call<std::tuple<Tensor, Tensor>>("mplug2::attention_fwd_reference", "", q, k, v, key_lengths, key_mask, causal,
                                            scale, return_lse);
  const Mask mask(shape, key_lengths, key_mask, causal, q.scalar_type());
  auto [folded_out, folded_lse] = call<std::tuple<Tensor, Tensor>>(
      "aten::_scaled_dot_product_flash_attention_for_cpu", "", fold(q, shape), keys_first(k), keys_first(v), 0.0,
      mask.is_causal, mask.added, std::optional<double>(scale));
  const Tensor out = torch::stable::contiguous(unfold(folded_out, shape));  // a view: the kernel writes (B, S, N, H)
  zero_empty(mask, out, shape.heads * shape.head_dim);
  if (!return_lse) return {out, torch::stable::empty({0}, ScalarType::Float)};
  // (B, N, G*S), stored (B, G*S, N) -> (B*G, N, S)
  const Tensor by_query = torch::stable::contiguous(torch::stable::transpose(folded_lse, 1, 2));
  set_empty(mask, by_query, shape.heads, kMinusInfinity);
  const Tensor rows = torch::stable::view(by_query, {shape.batch * shape.groups, shape.queries, shape.heads});
  return {out, torch::stable::contiguous(torch::stable::transpose(rows, 1, 2))};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse, std::optional<Tensor> key_lengths,
                                                 std::optional<Tensor> key_mask, bool causal, double scale) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  check_shape("attention", "dout", dout, "[B*G, S, N, H]", {q.size(0), q.size(1), q.size(2), q.size(3)});
  check_shape("attention", "out", out, "[B*G, S, N, H]", {q.size(0), q.size(1), q.size(2), q.size(3)});
  if (!has_kernel(q) || q.numel() == 0 || shape.keys == 0 || lse.numel() == 0)
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::attention_bwd_reference", "", dout, q, k, v, out, lse, key_lengths,
                                                    key_mask, causal, scale);
  check_shape("attention", "lse", lse, "[B*G, N, S]", {q.size(0), q.size(2), q.size(1)});
  const Mask mask(shape, key_lengths, key_mask, causal, q.scalar_type());
  const int64_t total = shape.groups * shape.queries;
  // (B*G, N, S) -> (B, N, G*S). With lse = +inf a query without keys has weight exp(s - inf) = 0 everywhere: no gradient.
  const Tensor by_query = torch::stable::clone(torch::stable::reshape(
      torch::stable::contiguous(torch::stable::transpose(lse, 1, 2)), {shape.batch, total, shape.heads}));
  set_empty(mask, by_query, shape.heads, -kMinusInfinity);
  auto [dq, dk, dv] = call<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::_scaled_dot_product_flash_attention_for_cpu_backward", "", fold(dout, shape), fold(q, shape), keys_first(k),
      keys_first(v), fold(out, shape), torch::stable::transpose(by_query, 1, 2), 0.0, mask.is_causal, mask.added,
      std::optional<double>(scale));
  return {torch::stable::contiguous(unfold(dq, shape)), torch::stable::contiguous(torch::stable::transpose(dk, 1, 2)),
          torch::stable::contiguous(torch::stable::transpose(dv, 1, 2))};
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&mplug2::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&mplug2::attention_bwd));
}
