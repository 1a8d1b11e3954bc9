// Every op's schema with its formula: the table of contents of the compiled half.
// An op has a kernel for the CPU here; on other devices, and for dtypes without a kernel, `<op>_reference` runs, which
// is implemented in Python (mplug2/ops/reference.py). Letters: B batch, G rows of q per row of k and v, T frames, L
// tokens per frame, S queries, K keys, N heads, H head dim, D width, V vocabulary, M rows.
#include <torch/csrc/stable/library.h>

#ifndef MPLUG2_EMULATED
#include "core/cpu.h"
#endif

// The emulated CUDA kernels (tests/emulator) implement the same schemas in a namespace of their own.
#ifndef MPLUG2_NAMESPACE
#define MPLUG2_NAMESPACE mplug2
#endif

namespace {

// An op `name` and the reference it falls back to, of one signature.
void define(torch::stable::detail::StableLibrary& m, const std::string& name, const std::string& signature) {
  m.def((name + signature).c_str());
  m.def((name + "_reference" + signature).c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY(MPLUG2_NAMESPACE, m) {
  // out = softmax(scale q k^T) v over the keys j that query s of S may see: j < key_lengths[b], key_mask[b, j] and,
  // where causal, j <= s + K - S. lse = log sum exp of the scaled scores, empty unless asked for. q (B*G, S, N, H), row
  // b*G + g reads row b of k and v (B, K, N, H); out like q; lse (B*G, N, S). A query without keys: out 0, lse -inf,
  // gradient 0.
  define(m, "attention_fwd",
         "(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? key_mask, bool causal, float scale, "
         "bool return_lse) -> (Tensor out, Tensor lse)");
  define(m, "attention_bwd",
         "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_lengths, Tensor? key_mask, "
         "bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");

  // Attention of q over keys x key_weight^T and values x value_weight^T that are never made: with the N heads' rows of
  // the weights, weights = softmax(scale (q key_weight) x^T) over the keys where key_mask is true, context = weights x,
  // out = context value_weight^T. q (B*G, S, N, H), row b*G + g reads row b of x (B, K, D), whose hidden rows must be
  // finite; weights (B, G*S*N, K rounded up to 8, with zeros) and context (B, G*S*N, D) are for the backward pass,
  // empty unless asked for. A query without keys: out 0, gradient 0.
  define(m, "fusion_fwd",
         "(Tensor q, Tensor x, Tensor key_weight, Tensor value_weight, Tensor? key_mask, float scale, "
         "bool return_saved) -> (Tensor out, Tensor weights, Tensor context)");
  define(m, "fusion_bwd",
         "(Tensor dout, Tensor q, Tensor x, Tensor key_weight, Tensor value_weight, Tensor weights, Tensor context, "
         "float scale) -> (Tensor dq, Tensor dx, Tensor dkey_weight, Tensor dvalue_weight)");

  // out = x + up(act), act = QuickGELU(conv(hidden)), hidden = down(LN(x)); conv: 3 taps over T per channel, zero
  // padded, conv_weight[:, 1] at the frame itself. x (B, T, L, D); down (D/2, D), conv (D/2, 3), up (D, D/2). The first
  // num_prefix_tokens of a frame pass through. hidden (B*T*L, D/2) is for the backward pass, empty unless asked for.
  define(m, "local_temporal_fwd",
         "(Tensor x, Tensor ln_weight, Tensor ln_bias, Tensor down_weight, Tensor down_bias, Tensor conv_weight, "
         "Tensor conv_bias, Tensor up_weight, Tensor up_bias, int num_prefix_tokens, float eps, bool return_hidden) "
         "-> (Tensor out, Tensor hidden)");
  define(
      m, "local_temporal_bwd",
      "(Tensor dout, Tensor x, Tensor hidden, Tensor ln_weight, Tensor ln_bias, Tensor down_weight, Tensor down_bias, "
      "Tensor conv_weight, Tensor conv_bias, Tensor up_weight, Tensor up_bias, int num_prefix_tokens, float eps) "
      "-> (Tensor dx, Tensor dln_weight, Tensor dln_bias, Tensor ddown_weight, Tensor ddown_bias, "
      "Tensor dconv_weight, Tensor dconv_bias, Tensor dup_weight, Tensor dup_bias)");

  // sum = x + residual; normed = (sum - mean) / sqrt(var + eps) * weight + bias over the last dimension.
  define(m, "add_layer_norm_fwd",
         "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor normed, Tensor sum)");
  // dx is the gradient of x and of residual alike.
  define(m, "add_layer_norm_bwd",
         "(Tensor dnormed, Tensor dsum, Tensor sum, Tensor weight, Tensor bias, float eps) "
         "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  // pre = x weight^T + bias; out = activation(pre) + residual; activation "none", "gelu" (x Phi(x), exact) or
  // "quick_gelu" (x sigmoid(1.702 x)). pre is for the backward pass, empty unless asked for.
  define(m, "linear_fwd",
         "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, bool return_pre) "
         "-> (Tensor out, Tensor pre)");
  define(m, "linear_bwd",
         "(Tensor dout, Tensor x, Tensor weight, Tensor pre, str activation) "
         "-> (Tensor dx, Tensor dweight, Tensor dbias)");

  // z = x weight^T + bias, a chunk of rows at a time; lse[m] = log sum_v exp z[m, v];
  // loss[m] = lse[m] - (1 - a) z[m, t] - a/V sum_v z[m, v], a = label_smoothing, t = targets[m]; 0 where t =
  // ignore_index.
  define(m, "linear_cross_entropy_fwd",
         "(Tensor x, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, float label_smoothing) "
         "-> (Tensor loss, Tensor lse)");
  define(m, "linear_cross_entropy_bwd",
         "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor lse, int ignore_index, "
         "float label_smoothing) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

#ifndef MPLUG2_EMULATED

namespace {

std::string instruction_set() { return mplug2::isa_name(mplug2::cpu_isa()); }

void force_instruction_set(std::string name) { mplug2::force_isa(name); }

bool has_bf16_products() { return mplug2::has_bf16_products(); }

}  // namespace

STABLE_TORCH_LIBRARY(mplug2_cpu, m) {
  // What the CPU at hand offers: "baseline", "avx2", "avx512" or "amx"; and whether it multiplies bfloat16 in hardware.
  m.def("instruction_set() -> str");
  m.def("has_bf16_products() -> bool");
  m.def("force_instruction_set(str name) -> ()");
  // Round an int8 product: rounded = round(x / scales) + 128, scales = max |x| / 127 of each row, NaN where a row is
  // not finite; out = activation(scales product + bias) + residual.
  m.def("int8_round_rows(Tensor x) -> (Tensor rounded, Tensor scales)");
  m.def(
      "int8_finish(Tensor product, Tensor scales, Tensor? bias, str activation, Tensor? residual, Tensor(a!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mplug2_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("has_bf16_products", TORCH_BOX(&has_bf16_products));
  m.impl("force_instruction_set", TORCH_BOX(&force_instruction_set));
}

#endif
