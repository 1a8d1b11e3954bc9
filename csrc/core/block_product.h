// Small float32 matrix products of blocks that lie in cache: C (+)= A B. A's elements are broadcast, so A may have any
// strides (a transposed block costs nothing); rows of B, which may also be bfloat16, and of C are whole vectors.
#pragma once
#include "core/vec.h"

namespace mplug2::MPLUG2_ISA {

// Rows and vectors of C held in registers: 6 x 4 of the 32 of AVX-512, 6 x 2 of 16 elsewhere.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;

struct BlockA {
  const float* data;
  int64_t row, depth;  // strides, elements
};

template <int kRows, int kVecs, class B>
MPLUG2_INLINE void product_tile(BlockA a, const B* b, int64_t b_stride, float* c, int64_t c_stride, int64_t depth,
                                bool accumulate) {
  Vec total[kRows][kVecs] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + d * b_stride + v * kLanes, Whole{});
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec left = splat(a.data[r * a.row + d * a.depth]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      // Added last: a sum over many blocks then errs like one over their number, not over all terms.
      float* out = c + r * c_stride + v * kLanes;
      store(out, accumulate ? total[r][v] + load(out, Whole{}) : total[r][v], Whole{});
    }
}

template <int kRows, class B>
void product_rows(BlockA a, const B* b, int64_t b_stride, float* c, int64_t c_stride, int64_t columns, int64_t depth,
                  bool accumulate) {
  int64_t at = 0;
  for (; at + kTileVecs * kLanes <= columns; at += kTileVecs * kLanes)
    product_tile<kRows, kTileVecs>(a, b + at, b_stride, c + at, c_stride, depth, accumulate);
  for (; at < columns; at += kLanes) product_tile<kRows, 1>(a, b + at, b_stride, c + at, c_stride, depth, accumulate);
}

// f(Rows<n>{}), n at most kTileRows.
template <int kRows>
struct Rows {
  static constexpr int count = kRows;
};
template <class F>
MPLUG2_INLINE void with_rows(int64_t n, F f) {
  switch (n) {
    case 1:
      return f(Rows<1>{});
    case 2:
      return f(Rows<2>{});
    case 3:
      return f(Rows<3>{});
    case 4:
      return f(Rows<4>{});
    case 5:
      return f(Rows<5>{});
    default:
      return f(Rows<6>{});
  }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), added to C if `accumulate`; columns is a multiple of kLanes.
template <class B>
void block_product(BlockA a, const B* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows, int64_t columns,
                   int64_t depth, bool accumulate) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const BlockA part{a.data + row * a.row, a.row, a.depth};
    with_rows(rows - row < kTileRows ? rows - row : kTileRows, [&](auto tile) {
      product_rows<decltype(tile)::count>(part, b, b_stride, c + row * c_stride, c_stride, columns, depth, accumulate);
    });
  }
}

// ---- transposing a block of kLanes x kLanes in registers
// ------------------------------------------------------------- One step of the butterfly: vectors `kStep` apart
// exchange the lanes whose index has the bit kStep.
template <int kStep>
MPLUG2_INLINE void exchange(Vec* rows) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = rows[i], b = rows[i + kStep];
#if defined(__clang__)
    for (int lane = 0; lane < kLanes; ++lane) {
      rows[i][lane] = lane & kStep ? b[lane - kStep] : a[lane];
      rows[i + kStep][lane] = lane & kStep ? b[lane] : a[lane + kStep];
    }
#else
    VecInt low{}, high{};
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
      high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
    }
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
#endif
  }
}
MPLUG2_INLINE void transpose(Vec* rows) {
  if constexpr (kLanes >= 16) exchange<8>(rows);
  if constexpr (kLanes >= 8) exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

// out[i] = sum over h of a[i, h] b[i, h], added in the order in which block_product adds: bit-equal to its element for
// equal rows. Rows of `width` floats, a multiple of kLanes; `rows` may be any number, but whole vectors of `out` are
// written.
inline void row_products(const float* a, const float* b, int64_t width, int64_t rows, float* out) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int count = rows - row < kLanes ? static_cast<int>(rows - row) : kLanes;
    Vec total{};
    for (int64_t h = 0; h < width; h += kLanes) {
      Vec left[kLanes], right[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        left[r] = r < count ? load(a + (row + r) * width + h, Whole{}) : Vec{};
        right[r] = r < count ? load(b + (row + r) * width + h, Whole{}) : Vec{};
      }
      transpose(left);
      transpose(right);
      for (int r = 0; r < kLanes; ++r) total += left[r] * right[r];
    }
    store(out + row, total, Whole{});
  }
}

}  // namespace mplug2::MPLUG2_ISA
