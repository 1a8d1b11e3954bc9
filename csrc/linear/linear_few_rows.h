// The product of a few rows (a decoding step): every weight is read from memory once, where it lies, and meets all
// rows.
#include "core/block_product.h"
#include "linear/linear.h"

namespace mplug2::MPLUG2_ISA {
namespace {

// out[r, c] = sum over d of x[r, d] weight[c, d], for a tile of sums that is held in registers.
template <int kRows, int kColumns, class T>
MPLUG2_INLINE void dot_tile(const float* x, const T* weight, int64_t weight_stride, int64_t depth, float* out) {
  Vec total[kRows][kColumns] = {};
  for_lanes(depth, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
    Vec right[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      right[c] = load(weight + c * weight_stride + d, lanes);
      __builtin_prefetch(weight + (c + kColumns) * weight_stride + d, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec left = load(x + r * depth + d, lanes);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) total[r][c] += left * right[c];
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) out[r * kFewColumns + c] = sum(total[r][c]);
}

// The same for `columns` <= kFewColumns columns.
template <int kRows, class T>
MPLUG2_INLINE void dot_rows(const float* x, const T* weight, int64_t weight_stride, int64_t depth, int64_t columns,
                            float* out) {
  int64_t c = 0;
  for (; c + kTileVecs <= columns; c += kTileVecs)
    dot_tile<kRows, kTileVecs>(x, weight + c * weight_stride, weight_stride, depth, out + c);
  for (; c < columns; ++c) dot_tile<kRows, 1>(x, weight + c * weight_stride, weight_stride, depth, out + c);
}

}  // namespace
}  // namespace mplug2::MPLUG2_ISA
