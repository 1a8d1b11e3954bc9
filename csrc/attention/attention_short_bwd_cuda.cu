// Gradients of attention of short rows on a GPU: no mask, one group, one launch, no workspace.
#include "attention/attention_cuda.h"
#include "attention/attention_short_bwd.cuh"

namespace mplug2::attention {
namespace {

const Instances kShort{{"attention", "attention_bwd_short_bf16", MPLUG2_DIGEST(attention_short_bwd)},
                       {"attention", "attention_bwd_short_fp16", MPLUG2_DIGEST(attention_short_bwd)}};

// ds of all queries in shared memory where they fit, else of a block of them.
ShortBwdLayout layout_of(const Device& device, int queries, int keys) {
  const ShortBwdLayout whole(queries, keys);
  return whole.bytes <= device.max_shared_bytes() ? whole : ShortBwdLayout(kBlockRows, keys);
}

template <class T>
auto kernel_of(int tiles, bool whole) {
  switch (tiles) {
    case 1:
      return whole ? short_bwd_kernel<T, 1, true> : short_bwd_kernel<T, 1, false>;
    case 3:
      return whole ? short_bwd_kernel<T, 3, true> : short_bwd_kernel<T, 3, false>;
    default:
      return whole ? short_bwd_kernel<T, 4, true> : short_bwd_kernel<T, 4, false>;
  }
}

template <class T>
Gradients backward(const Device& device, const Call& call, const Saved& saved) {
  const int queries = static_cast<int>(call.shape.queries), keys = static_cast<int>(call.shape.keys);
  const ShortBwdLayout layout = layout_of(device, queries, keys);
  const bool whole = layout.bytes == ShortBwdLayout(queries, keys).bytes;
  // NOTE: three tensors, though the kernel could write into one: outputs of an op must not share memory (opcheck).
  const Tensor dq = torch::stable::new_empty(call.q, call.q.sizes()),
               dk = torch::stable::new_empty(call.k, call.k.sizes()),
               dv = torch::stable::new_empty(call.v, call.v.sizes());
  launch(
      device, "attention_bwd_short", kernel_of<T>(short_bwd_tiles(keys), whole),
      dim3(call.shape.batch * call.shape.heads), kShortBwdThreads, layout.bytes,
      ShortBwdParams<T>{tokens<T>(call.q), tokens<T>(saved.out), tokens<T>(saved.dout), tokens<T>(call.k),
                        tokens<T>(call.v), device_data<float>(saved.lse), mutable_tokens<T>(dq), mutable_tokens<T>(dk),
                        mutable_tokens<T>(dv), queries, keys, static_cast<int>(call.shape.heads),
                        static_cast<float>(call.scale), static_cast<float>(call.scale) * kLog2E, layout});
  return {dq, dk, dv};
}

}  // namespace

std::optional<Gradients> short_backward(const Device& device, const Call& call, const Saved& saved) {
  const auto& shape = call.shape;
  if (!call.is_for_kernels() || !saved.has_lse(call) || call.has_mask() || shape.groups != 1 ||
      shape.queries > kShortBwdRows || shape.keys > kShortBwdKeys ||
      layout_of(device, static_cast<int>(shape.queries), static_cast<int>(shape.keys)).bytes >
          device.max_shared_bytes() ||
      !kShort.serve(device, call.q.scalar_type()))
    return std::nullopt;
  const auto run = call.q.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, {shape, rows_of(call.q), rows_of(call.k), rows_of(call.v), {}, {}, false, call.scale},
             {rows_of(saved.dout), rows_of(saved.out), torch::stable::contiguous(saved.lse)});
}

}  // namespace mplug2::attention
