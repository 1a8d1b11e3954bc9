// How host code of a CUDA op runs its kernels: the caller's device and stream, pointers of tensors, checked launches.
// The same host code is compiled by g++ into the emulated library (tests/emulator), whose tensors lie in CPU memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "core/device.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// MPLUG2_CUDA_LIBRARY(m) { m.impl("<op>_fwd", ...); }: the op's registration, in either library.
#if defined(__CUDACC__)
#define MPLUG2_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(mplug2, CUDA, m)
#else
#define MPLUG2_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(mplug2_emulated, CPU, m)
#endif

namespace mplug2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct DeviceElement;
template <>
struct DeviceElement<bf16> {
  static constexpr ScalarType dtype = ScalarType::BFloat16;
};
template <>
struct DeviceElement<fp16> {
  static constexpr ScalarType dtype = ScalarType::Half;
};
template <>
struct DeviceElement<float> {
  static constexpr ScalarType dtype = ScalarType::Float;
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Device of the tensors of a call: makes it current while the object lives, and knows its stream and its limits.
class Device {
 public:
  explicit Device(const Tensor& t) : guard_(t.get_device_index()), index_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  int num_multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes of shared memory that a block may ask for.
  int max_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  // 80, 90, 120, ...
  int capability() const {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }
  torch::stable::accelerator::DeviceGuard guard_;
  int index_;
  cudaStream_t stream_ = nullptr;
};

template <class T>
const T* device_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_device_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// kernel<<<grid, threads, shared_bytes>>>(arguments...) on the device's stream, without synchronising; `name` is how an
// error calls it. NOTE: the limit of shared memory is set at every launch: a flag kept would belong to one device.
template <class... Params, class... Arguments>
void launch(const Device& device, const char* name, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    shared_bytes),
               name);
  kernel<<<grid, threads, shared_bytes, device.stream()>>>(static_cast<Params>(arguments)...);
  check_cuda(cudaGetLastError(), name);
}

#else

// Stands for one GPU: its limits can be set by tests (emulator.h).
class Device {
 public:
  explicit Device(const Tensor&) {}
  int num_multiprocessors() const { return emulator::device().num_multiprocessors; }
  int max_shared_bytes() const { return emulator::device().max_shared_bytes; }
  int capability() const { return emulator::device().capability; }

 private:
  emulator::Scope scope_;
};

// Bytes from the first to the last element of a tensor, whatever its strides (none negative).
inline size_t extent_bytes(const Tensor& t, size_t element_size) {
  size_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return 0;
    last += static_cast<size_t>(t.size(i) - 1) * t.stride(i);
  }
  return (last + 1) * element_size;
}

// What these give out is all of global memory that kernels may touch, while the op's Device lives.
template <class T>
const T* device_data(const Tensor& t) {
  const void* data = t.const_data_ptr();
  emulator::allow(data, extent_bytes(t, sizeof(T)), /*is_writable=*/false);
  return static_cast<const T*>(data);
}
template <class T>
T* mutable_device_data(const Tensor& t) {
  void* data = t.mutable_data_ptr();
  emulator::allow(data, extent_bytes(t, sizeof(T)), /*is_writable=*/true);
  return static_cast<T*>(data);
}

template <class... Params, class... Arguments>
void launch(const Device&, const char* name, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            const Arguments&... arguments) {
  emulator::launch(name, grid, threads, shared_bytes, [=] { kernel(static_cast<Params>(arguments)...); });
}

#endif

}  // namespace mplug2
