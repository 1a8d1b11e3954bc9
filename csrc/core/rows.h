// Small things that the host halves of row kernels share: typed pointers, float32 copies of parameter vectors, and the
// fixed split of rows that makes reductions the same for any number of threads.
#pragma once
#include <algorithm>
#include <vector>

#include "core/bf16.h"
#include "core/check.h"
#include "core/dispatcher.h"

namespace mplug2 {

template <class T>
struct Element;
template <>
struct Element<float> {
  static constexpr ScalarType dtype = ScalarType::Float;
};
template <>
struct Element<Bf16> {
  static constexpr ScalarType dtype = ScalarType::BFloat16;
};

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A parameter in float32 and contiguous; the tensor owns or shares the memory.
inline Tensor as_float(const Tensor& t) { return torch::stable::contiguous(to_dtype(t, ScalarType::Float)); }

// f(first, last) over [0, count) in parallel, each call worth about 32 KB of elements.
template <class F>
void parallel_rows(int64_t count, int64_t width, F f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, width)), f);
}

// Sums over rows are made in this many parts, each by one thread, and the parts added in order.
constexpr int64_t kParts = 32;

// f(part, first, last) for every part of [0, count), in parallel.
template <class F>
void parallel_parts(int64_t count, F f) {
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) f(part, count * part / kParts, count * (part + 1) / kParts);
  });
}

// The sum of `parts` (kParts, width) over its rows, in the dtype asked for.
inline Tensor sum_parts(const std::vector<float>& parts, int64_t width, ScalarType dtype) {
  Tensor total = torch::stable::empty({width}, ScalarType::Float);
  float* out = mutable_data<float>(total);
  std::copy_n(parts.data(), width, out);
  for (int64_t part = 1; part < kParts; ++part)
    for (int64_t i = 0; i < width; ++i) out[i] += parts[part * width + i];
  return to_dtype(total, dtype);
}

// total += part, total in float32.
inline void add_into(const Tensor& total, const Tensor& part) {
  const Tensor values = torch::stable::contiguous(to_dtype(part, ScalarType::Float));
  float* out = mutable_data<float>(total);
  const float* in = data<float>(values);
  torch::stable::parallel_for(0, total.numel(), 8192, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) out[i] += in[i];
  });
}

}  // namespace mplug2
