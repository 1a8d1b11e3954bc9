// Host half of the one-pass kernels round matrix products: which instance serves, what tensors kernels read, grids.
#pragma once
#include <algorithm>

#include "core/column_sums.cuh"
#include "core/instance.h"

namespace mplug2 {

constexpr int64_t kMaxColumns = 1 << 24;  // of a matrix: kernels count them in 32 bits

inline bool is_half(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
}

// Contiguous and aligned to 16 bytes: itself, or a copy.
inline Tensor aligned(const Tensor& t) {
  const Tensor rows = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 ? rows : torch::stable::clone(rows);
}

inline Tensor as_matrix(const Tensor& t, int64_t columns) { return torch::stable::reshape(t, {-1, columns}); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks as the device holds at once, or as there is work for.
inline int resident_blocks(const Device& device, int blocks_a_multiprocessor, int64_t wanted) {
  const int64_t most = int64_t{device.num_multiprocessors()} * blocks_a_multiprocessor;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
}

// parts (num_parts, kSets, width) added up into `sets`.
template <class T, int kSets>
void sum_parts(const Device& device, const char* name, const Tensor& parts, const ColumnSumsTo<T> (&sets)[kSets]) {
  const int width = static_cast<int>(parts.size(2));
  SumPartsParams<T, kSets> params{device_data<float>(parts), {}, static_cast<int>(parts.size(0)), width};
  std::copy_n(sets, kSets, params.sets);
  launch(device, name, sum_parts_kernel<T, kSets>, dim3(static_cast<unsigned>(ceil_div(width, kWarp)), kSets),
         kSumPartsThreads, kSumPartsSharedBytes, params);
}

}  // namespace mplug2
