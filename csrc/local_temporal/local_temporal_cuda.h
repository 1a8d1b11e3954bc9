// The forms of local_temporal on a GPU, which give nothing where they do not serve the call (local_temporal_cuda.cu
// asks them in turn).
#pragma once
#include "core/instance.h"
#include "local_temporal/local_temporal_host.h"

namespace mplug2::local_temporal {

using Outputs = std::tuple<Tensor, Tensor>;  // out, hidden
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Two kernels: products of ours, with what stands round them in their prologue and epilogues.
std::optional<Outputs> product_forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w,
                                       const LocalTemporalShape& shape, bool return_hidden);
// Products by ATen (cuBLAS), and passes of ours round them.
std::optional<Outputs> passes_forward(const Device& device, const Tensor& x, const LocalTemporalWeights& w,
                                      const LocalTemporalShape& shape, bool return_hidden);
std::optional<Gradients> passes_backward(const Device& device, const Tensor& dout, const Tensor& x,
                                         const Tensor& hidden, const LocalTemporalWeights& w,
                                         const LocalTemporalShape& shape);

}  // namespace mplug2::local_temporal
