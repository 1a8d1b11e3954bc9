// Argument checks: one clear line that names the op, the tensor, what was expected and what was got.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "core/cpu.h"

namespace mplug2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// `shape` holds -1 where any size will do; `letters` is how the message writes it.
inline void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                        std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  for (int64_t i = 0; i < static_cast<int64_t>(shape.size()); ++i) {
    const int64_t size = shape.begin()[i];
    fits = fits && (size < 0 || t.size(i) == size);
    expected += (i ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must have shape ", letters, " = [", expected, "], got ", shape_text(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype),
                  " like the first argument, got ", dtype_text(t.scalar_type()));
}

// NOTE: one tensor on a GPU is enough for the dispatcher to choose the GPU's kernel, which would read the others there.
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  const auto text = [](const Tensor& of) {
    return of.is_cuda() ? "cuda:" + std::to_string(of.get_device_index()) : "cpu";
  };
  STD_TORCH_CHECK(t.device() == first.device(), op, ": ", name, " must be on ", text(first),
                  " like the first argument, got ", text(t));
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  op, ": ", name, " must be float32, bfloat16, float16 or float64, got ", dtype_text(dtype));
}

// float32 and bfloat16 have kernels; float16 and float64 are left to the reference.
inline bool has_kernel(const Tensor& t) {
  return cpu_isa() != Isa::kReference &&
         (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16);
}

}  // namespace mplug2
