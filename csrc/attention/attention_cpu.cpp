// Attention on the CPU: one task is one head of one row of k and v with some (forward) or all (backward) of its
// queries. The G rows of q that share a row of k and v are G*S queries of it, so nothing is copied per group, and
// packed projections are read in place.
#define MPLUG2_ISA baseline
#include "attention/attention_host.h"
#include "attention/attention_rows.h"
#include "core/cpu.h"
#include "core/rows.h"
#include "core/scratch.h"

namespace mplug2 {
namespace {

// Queries of one forward task at most: enough to pay for packing the keys, few enough to share among threads.
constexpr int64_t kTaskQueries = 384;

Tensor last_contiguous(const Tensor& t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

template <class T>
AttentionView<T> view(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// The mask's tensors, contiguous and alive while the kernels run.
struct MaskTensors {
  std::optional<Tensor> key_lengths, key_mask;
  AttentionMask mask;
  MaskTensors(const std::optional<Tensor>& lengths, const std::optional<Tensor>& allowed, bool causal, double scale)
      : key_lengths(lengths ? std::make_optional(torch::stable::contiguous(to_dtype(*lengths, ScalarType::Long)))
                            : lengths),
        key_mask(allowed ? std::make_optional(torch::stable::contiguous(*allowed)) : allowed),
        mask{key_lengths ? data<int64_t>(*key_lengths) : nullptr, key_mask ? data<bool>(*key_mask) : nullptr, causal,
             static_cast<float>(scale)} {}
};

// f(task, workspace) for every task, in parallel; `floats` of workspace for each thread. Threads take at least as many
// tasks as are worth waking one: a task reads keys and values for some queries.
template <class F>
void parallel_tasks(const AttentionShape& shape, int64_t tasks, int64_t queries, int64_t floats, F f) {
  constexpr int64_t kWorthAThread = 150000;                              // multiplications: about 15 us
  const int64_t work = 1 + shape.keys * shape.head_dim * (queries + 8);  // 8: packing
  torch::stable::parallel_for(0, tasks, kWorthAThread / work + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(floats * sizeof(float));
    for (int64_t task = begin; task < end; ++task) f(task, scratch.data<float>());
  });
}

template <class T>
std::tuple<Tensor, Tensor> forward(const AttentionShape& shape, const AttentionMask& mask, const Tensor& q,
                                   const Tensor& k, const Tensor& v, bool return_lse) {
  const auto kernels = MPLUG2_KERNELS(attention_kernels<T>());
  const int64_t rows = shape.batch * shape.groups, total = shape.total_queries();
  Tensor out = torch::stable::empty(q.sizes(), q.scalar_type());
  Tensor lse = return_lse ? torch::stable::empty({rows, shape.heads, shape.queries}, ScalarType::Float)
                          : torch::stable::empty({0}, ScalarType::Float);
  const int64_t parts = (total + kTaskQueries - 1) / kTaskQueries, part = (total + parts - 1) / parts;
  parallel_tasks(shape, shape.batch * shape.heads * parts, part, attention_fwd_workspace(part, shape.head_dim),
                 [&](int64_t task, float* workspace) {
                   const int64_t first = task % parts * part, head = task / parts % shape.heads;
                   if (first >= total) return;
                   kernels.fwd(shape, mask, view<T>(q), view<T>(k), view<T>(v), mutable_data<T>(out),
                               return_lse ? mutable_data<float>(lse) : nullptr, task / parts / shape.heads, head, first,
                               std::min(first + part, total), workspace);
                 });
  return {out, lse};
}

// Whether ATen's fused kernel serves better: it multiplies bfloat16 in AMX tiles, at twice the speed of float32 vectors
// (measured at 257 keys: 0.38 against 0.2 TFLOP/s), but reads neither our masks nor shared keys in place.
bool aten_is_faster(const AttentionShape& shape, const Tensor& q, const AttentionMask& mask) {
  return cpu_isa() == Isa::kAmx && q.scalar_type() == ScalarType::BFloat16 && shape.groups == 1 &&
         shape.queries >= 64 && !mask.causal && mask.key_lengths == nullptr && mask.key_mask == nullptr;
}

std::tuple<Tensor, Tensor> forward_by_aten(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                           bool return_lse) {
  const auto heads_first = [](const Tensor& t) { return torch::stable::transpose(t, 1, 2); };
  const auto [out, lse] = call<std::tuple<Tensor, Tensor>>("aten::_scaled_dot_product_flash_attention_for_cpu", "",
                                                           heads_first(q), heads_first(k), heads_first(v), 0.0, false,
                                                           std::optional<Tensor>(), std::make_optional(scale));
  return {torch::stable::contiguous(heads_first(out)),  // a view: the kernel writes (B, S, N, H)
          return_lse ? torch::stable::contiguous(lse) : torch::stable::empty({0}, ScalarType::Float)};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const AttentionShape& shape, const AttentionMask& mask, const Tensor& dout,
                                            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse) {
  const auto kernels = MPLUG2_KERNELS(attention_kernels<T>());
  const int64_t total = shape.total_queries();
  Tensor dq = torch::stable::empty(q.sizes(), q.scalar_type());
  Tensor dk = torch::stable::empty(k.sizes(), k.scalar_type()), dv = torch::stable::empty(v.sizes(), v.scalar_type());
  parallel_tasks(shape, shape.batch * shape.heads, total, attention_bwd_workspace(total, shape.head_dim),
                 [&](int64_t task, float* workspace) {
                   kernels.bwd(shape, mask, view<T>(dout), view<T>(q), view<T>(k), view<T>(v), view<T>(out),
                               data<float>(lse), mutable_data<T>(dq), mutable_data<T>(dk), mutable_data<T>(dv),
                               task / shape.heads, task % shape.heads, workspace);
                 });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask, bool causal,
                                         double scale, bool return_lse) {
  const AttentionShape shape = check_attention(q, k, v, key_lengths, key_mask);
  if (!has_kernel(q) || q.numel() == 0 || k.numel() == 0)
    return call<std::tuple<Tensor, Tensor>>("mplug2::attention_fwd_reference", "", q, k, v, key_lengths, key_mask,
                                            causal, scale, return_lse);
  const MaskTensors tensors(key_lengths, key_mask, causal, scale);
  const Tensor q_read = last_contiguous(q), k_read = last_contiguous(k), v_read = last_contiguous(v);
  if (aten_is_faster(shape, q, tensors.mask)) return forward_by_aten(q_read, k_read, v_read, scale, return_lse);
  const auto run = q.scalar_type() == ScalarType::Float ? forward<float> : forward<Bf16>;
  return run(shape, tensors.mask, q_read, k_read, v_read, return_lse);
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 std::optional<Tensor> key_lengths, std::optional<Tensor> key_mask,
                                                 bool causal, double scale) {
  const AttentionShape shape = check_attention_bwd(dout, q, k, v, out, key_lengths, key_mask);
  if (!has_kernel(q) || q.numel() == 0 || k.numel() == 0)
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::attention_bwd_reference", "", dout, q, k, v, out, lse,
                                                    key_lengths, key_mask, causal, scale);
  check_shape("attention", "lse", lse, "[B*G, N, S]", {q.size(0), q.size(2), q.size(1)});
  const MaskTensors tensors(key_lengths, key_mask, causal, scale);
  const auto run = q.scalar_type() == ScalarType::Float ? backward<float> : backward<Bf16>;
  return run(shape, tensors.mask, last_contiguous(dout), last_contiguous(q), last_contiguous(k), last_contiguous(v),
             last_contiguous(out), torch::stable::contiguous(lse));
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&mplug2::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&mplug2::attention_bwd));
}
