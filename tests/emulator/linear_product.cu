// Stands in for linear's product, whose loop is CUTLASS's and cannot be emulated: the same contract (linear_product.h)
// and epilogue (linear_epilogue.cuh) over plain sums, so that tests reach the host code and our part of the kernel.
#include "core/chunk.cuh"
#include "linear/linear_cuda.h"
#include "linear/linear_epilogue.cuh"
#include "linear/linear_product.h"

namespace mplug2::linear {
namespace {

constexpr int kThreads = 64;

// A thread computes eight neighbouring columns of a row.
template <class T, class Activation>
MPLUG2_KERNEL(kThreads, 1)
product_kernel(ProductParams<T> p) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = chunk / (p.width / kChunk);
  const int column = static_cast<int>(chunk % (p.width / kChunk)) * kChunk;
  if (row >= p.rows) return;
  float bias[kChunk] = {}, residual[kChunk] = {}, pre[kChunk], out[kChunk];
  if (p.bias != nullptr) unpack_chunk<T>(load16(p.bias + column), bias);
  if (p.residual != nullptr) unpack_chunk<T>(load16(p.residual + row * p.width + column), residual);
  for (int j = 0; j < kChunk; ++j) {
    float sum = 0.0f;
    for (int k = 0; k < p.depth; ++k)
      sum += to_float(p.x[row * p.depth + k]) * to_float(p.weight[int64_t{column + j} * p.depth + k]);
    pre[j] = add_bias(sum, bias[j]);
    out[j] = finish<Activation>(pre[j], residual[j]);
  }
  if (p.pre != nullptr) store16(p.pre + row * p.width + column, pack_chunk<T>(pre));
  store16(p.out + row * p.width + column, pack_chunk<T>(out));
}

}  // namespace

template <class T, class Activation>
const char* run_product(const ProductParams<T>& p, void*) {
  const int64_t chunks = int64_t{p.rows} * (p.width / kChunk);
  emulator::launch("linear_fwd_product", dim3(static_cast<unsigned>((chunks + kThreads - 1) / kThreads)), kThreads, 0,
                   [=] { product_kernel<T, Activation>(p); });
  return nullptr;
}

template const char* run_product<bf16, Identity>(const ProductParams<bf16>&, void*);
template const char* run_product<bf16, QuickGelu>(const ProductParams<bf16>&, void*);
template const char* run_product<bf16, Gelu>(const ProductParams<bf16>&, void*);
template const char* run_product<fp16, Identity>(const ProductParams<fp16>&, void*);
template const char* run_product<fp16, QuickGelu>(const ProductParams<fp16>&, void*);
template const char* run_product<fp16, Gelu>(const ProductParams<fp16>&, void*);

// ---- the epilogue alone, in float32, which outputs of 16 bits would hide --------------------------------------------
struct EpilogueParams {
  const float *sum, *bias, *residual;
  float* out;
  int count;
};

template <class Activation>
MPLUG2_KERNEL(kThreads, 1)
epilogue_kernel(EpilogueParams p) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < p.count) p.out[i] = finish<Activation>(add_bias(p.sum[i], p.bias[i]), p.residual[i]);
}

void run_epilogue(Tensor sum, Tensor bias, Tensor residual, std::string activation, Tensor out) {
  const Device device(sum);
  const EpilogueParams params{device_data<float>(sum), device_data<float>(bias), device_data<float>(residual),
                              mutable_device_data<float>(out), static_cast<int>(sum.numel())};
  with_activation(check_activation(activation), [&](auto type) {
    launch(device, "epilogue", epilogue_kernel<decltype(type)>,
           dim3(static_cast<unsigned>(ceil_div(params.count, kThreads))), kThreads, 0, params);
  });
}

}  // namespace mplug2::linear

STABLE_TORCH_LIBRARY_FRAGMENT(mplug2_samples, m) {
  m.def("linear_epilogue(Tensor sum, Tensor bias, Tensor residual, str activation, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mplug2_samples, CPU, m) {
  m.impl("linear_epilogue", TORCH_BOX(&mplug2::linear::run_epilogue));
}
