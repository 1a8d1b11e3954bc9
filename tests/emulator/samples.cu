// The kernels of samples.cuh and mutant.cuh as ops, for the tests of the emulator.
#include <string>

#include "core/launch.h"
#include "mutant.cuh"
#include "samples.cuh"

namespace mplug2 {
namespace {

void run_sample(std::string name, Tensor x, Tensor y, int64_t n, int64_t blocks, int64_t threads,
                int64_t shared_bytes) {
  const Device device(x);
  emulator::allow(x.const_data_ptr(), extent_bytes(x, x.element_size()), /*is_writable=*/false);
  emulator::allow(y.mutable_data_ptr(), extent_bytes(y, y.element_size()), /*is_writable=*/true);
  for (const samples::Sample& sample : samples::kSamples)
    if (name == sample.name)
      return launch(device, sample.name, sample.kernel, dim3(static_cast<unsigned>(blocks)), static_cast<int>(threads),
                    static_cast<int>(shared_bytes),
                    samples::Params{x.const_data_ptr(), y.mutable_data_ptr(), static_cast<int>(n)});
  STD_TORCH_CHECK(false, "samples: there is no ", name);
}

// q (heads, queries, 64), k and v (heads, keys, 64); total (64) is added to.
template <class T>
void run_mutant(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& total, double scale,
                mutant::Mutation mutation) {
  const Device device(q);
  const int heads = static_cast<int>(q.size(0)), queries = static_cast<int>(q.size(1));
  launch(device, "mutant", mutant::attention_kernel<T>,
         dim3(static_cast<unsigned>((queries + mutant::kQueries - 1) / mutant::kQueries), static_cast<unsigned>(heads)),
         mutant::kThreads, mutant::kSharedBytes,
         mutant::Params<T>{device_data<T>(q), device_data<T>(k), device_data<T>(v), mutable_device_data<T>(out),
                           mutable_device_data<float>(total), queries, static_cast<int>(k.size(1)),
                           static_cast<float>(scale * 1.4426950408889634), mutation});
}

void mutated_attention(Tensor q, Tensor k, Tensor v, Tensor out, Tensor total, double scale, int64_t mutation) {
  const auto run = q.scalar_type() == ScalarType::BFloat16 ? run_mutant<bf16> : run_mutant<fp16>;
  run(q, k, v, out, total, scale, static_cast<mutant::Mutation>(mutation));
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY(mplug2_samples, m) {
  m.def("run(str name, Tensor x, Tensor(a!) y, int n, int blocks, int threads, int shared_bytes) -> ()");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) total, float scale, int mutation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mplug2_samples, CPU, m) {
  m.impl("run", TORCH_BOX(&mplug2::run_sample));
  m.impl("attention", TORCH_BOX(&mplug2::mutated_attention));
}
