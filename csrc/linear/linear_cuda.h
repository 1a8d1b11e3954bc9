// What the forms of linear on a GPU share: a call, and each form's functions, which give nothing where the form does
// not serve the call (linear_cuda.cu asks them in turn).
#pragma once
#include "core/activation.cuh"
#include "core/elementwise.h"
#include "linear/linear_host.h"

namespace mplug2::linear {

// Arguments of a forward pass, checked.
struct Call {
  Tensor x, weight;  // (..., D), (out, D)
  std::optional<Tensor> bias, residual;
  Activation activation;
  bool return_pre;

  int64_t width() const { return weight.size(0); }
  int64_t depth() const { return weight.size(1); }
  int64_t rows() const { return x.numel() / depth(); }
};

// As matrices (rows, out); pre is empty where it is not kept.
struct Outputs {
  Tensor out, pre;
};
using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // dx, dweight, dbias

// One kernel: activation and residual in the product's epilogue. Capability 8.x.
std::optional<Outputs> product_forward(const Device& device, const Call& call);
// The product by ATen (cuBLAS), and passes of ours over it.
std::optional<Outputs> passes_forward(const Device& device, const Call& call);
std::optional<Gradients> passes_backward(const Device& device, const Tensor& dout, const Tensor& x,
                                         const Tensor& weight, const Tensor& pre, Activation activation);

// f(type) with the activation as a type.
template <class F>
void with_activation(Activation activation, F f) {
  if (activation == Activation::kGelu)
    f(Gelu{});
  else if (activation == Activation::kQuickGelu)
    f(QuickGelu{});
  else
    f(Identity{});
}

inline std::optional<Tensor> aligned_rows(const std::optional<Tensor>& t, int64_t columns) {
  return t ? std::make_optional(aligned(as_matrix(*t, columns))) : std::nullopt;
}

}  // namespace mplug2::linear
