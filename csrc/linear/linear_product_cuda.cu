// linear as one kernel, whose epilogue is bias, activation and residual: no pass over the product follows. In builds
// that hold code for compute capability 8.x (MPLUG2_HAVE_SM80), for GPUs of it.
#include "linear/linear_cuda.h"
#include "linear/linear_product.h"

namespace mplug2::linear {

#if defined(MPLUG2_HAVE_SM80)
namespace {

const Instances kProduct{{"linear", "linear_fwd_product_bf16", MPLUG2_DIGEST(linear_product)},
                         {"linear", "linear_fwd_product_fp16", MPLUG2_DIGEST(linear_product)}};

constexpr int64_t kMaxRows = 1 << 30;  // CUTLASS counts them in 32 bits, and rounds up

bool is_aligned(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Left to cuBLAS: a bare product or one with a bias, which no pass follows; weights that are a view, since a copy of
// them costs more than a pass; and products of fewer tiles than the GPU has multiprocessors.
bool suits(const Device& device, const Call& call) {
  const bool has_pass = call.activation != Activation::kNone || call.residual;
  const int64_t tiles = ceil_div(call.rows(), kProductRows) * ceil_div(call.width(), kProductColumns);
  return device.capability() / 10 == 8 && has_pass && call.depth() % kChunk == 0 && call.depth() <= kMaxColumns &&
         call.rows() <= kMaxRows && tiles >= device.num_multiprocessors() && is_aligned(call.weight) &&
         call.weight.stride(0) == call.depth() && (!call.bias || is_aligned(*call.bias));
}

#if defined(__CUDACC__)
void* stream_of(const Device& device) { return device.stream(); }
#else
void* stream_of(const Device&) { return nullptr; }
#endif

template <class T>
Outputs forward(const Device& device, const Call& call) {
  const int64_t rows = call.rows(), width = call.width(), depth = call.depth();
  const Tensor x = aligned(as_matrix(call.x, depth));
  const std::optional<Tensor> residual = aligned_rows(call.residual, width);
  const Tensor out = torch::stable::new_empty(x, {rows, width});
  const Tensor pre = call.return_pre ? torch::stable::new_empty(x, {rows, width}) : torch::stable::new_empty(x, {0});
  const ProductParams<T> params{device_data<T>(x),
                                device_data<T>(call.weight),
                                call.bias ? device_data<T>(*call.bias) : nullptr,
                                residual ? device_data<T>(*residual) : nullptr,
                                call.return_pre ? mutable_device_data<T>(pre) : nullptr,
                                mutable_device_data<T>(out),
                                static_cast<int>(rows),
                                static_cast<int>(width),
                                static_cast<int>(depth)};
  with_activation(call.activation, [&](auto type) {
    const char* error = run_product<T, decltype(type)>(params, stream_of(device));
    STD_TORCH_CHECK(error == nullptr, "linear_fwd_product: ", error);
  });
  return {out, pre};
}

}  // namespace

std::optional<Outputs> product_forward(const Device& device, const Call& call) {
  const ScalarType dtype = call.x.scalar_type();
  if (!suits(device, call) || !kProduct.serve(device, dtype)) return std::nullopt;
  return dtype == ScalarType::BFloat16 ? forward<bf16>(device, call) : forward<fp16>(device, call);
}

#else

std::optional<Outputs> product_forward(const Device&, const Call&) { return std::nullopt; }

#endif

}  // namespace mplug2::linear
