// Resize of one decoded picture, interleaved RGB, 8 bits: the host side of frame preparation.
//
// nearest: out(y, x) = in(floor(y * h / H), floor(x * w / W)), the quotient in float32 as torch rounds it.
//
// area: out(y, x) = the mean of the source rectangle that the output pixel covers; a pixel at its edge counts by the
// share that is covered. In units of 1/H and 1/W of a source pixel every share is an integer, so the sum is exact and
// rounds once.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace mplug2::frames {

// A view of a picture: rows of `width` RGB pixels, `stride` bytes from one row to the next.
struct Picture {
  const uint8_t* data;
  int64_t height, width;
  int64_t stride;
};

// The result: rows of `width` RGB pixels without gaps.
struct Output {
  uint8_t* data;
  int64_t height, width;
};

constexpr int kChannels = 3;

// The source index of every output index. NOTE: float32 on purpose: it decides between two neighbours at some sizes.
inline std::vector<int64_t> nearest_indices(int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  std::vector<int64_t> index(out);
  for (int64_t i = 0; i < out; ++i) index[i] = std::min(static_cast<int64_t>(static_cast<float>(i) * scale), in - 1);
  return index;
}

inline void resize_nearest(const Picture& in, const Output& out) {
  const auto rows = nearest_indices(in.height, out.height);
  const auto columns = nearest_indices(in.width, out.width);
  uint8_t* target = out.data;
  for (const int64_t row : rows) {
    const uint8_t* line = in.data + row * in.stride;
    for (const int64_t column : columns) {
      const uint8_t* pixel = line + kChannels * column;
      for (int c = 0; c < kChannels; ++c) *target++ = pixel[c];
    }
  }
}

// The source indices [first, first + weights.size()) that one output index covers, and the share of each; shares sum to
// `in`.
struct Cover {
  int64_t first;
  std::vector<uint32_t> weights;
};

inline std::vector<Cover> area_covers(int64_t in, int64_t out) {
  std::vector<Cover> covers(out);
  for (int64_t i = 0; i < out; ++i) {
    // The output pixel is [begin, end), a source pixel [j * out, (j + 1) * out), both in units of 1/out of a source
    // pixel.
    const int64_t begin = i * in, end = (i + 1) * in;
    covers[i].first = begin / out;
    for (int64_t j = begin / out; j * out < end; ++j)
      covers[i].weights.push_back(static_cast<uint32_t>(std::min(end, (j + 1) * out) - std::max(begin, j * out)));
  }
  return covers;
}

inline void resize_area(const Picture& in, const Output& out) {
  const auto rows = area_covers(in.height, out.height);
  const auto columns = area_covers(in.width, out.width);
  const uint64_t area = static_cast<uint64_t>(in.height) * in.width;
  // Rows first: whole lines are added up, which the compiler vectorises, and the columns then touch only height * width
  // sums.
  std::vector<uint32_t> sums(kChannels * in.width);  // each at most 255 * height
  uint8_t* target = out.data;
  for (const Cover& row : rows) {
    std::fill(sums.begin(), sums.end(), 0);
    for (size_t j = 0; j < row.weights.size(); ++j) {
      const uint8_t* line = in.data + (row.first + static_cast<int64_t>(j)) * in.stride;
      const uint32_t weight = row.weights[j];
      for (size_t x = 0; x < sums.size(); ++x) sums[x] += weight * line[x];
    }
    for (const Cover& column : columns) {
      for (int c = 0; c < kChannels; ++c) {
        uint64_t sum = 0;
        for (size_t j = 0; j < column.weights.size(); ++j)
          sum +=
              static_cast<uint64_t>(column.weights[j]) * sums[kChannels * (column.first + static_cast<int64_t>(j)) + c];
        *target++ = static_cast<uint8_t>((sum + area / 2) / area);
      }
    }
  }
}

}  // namespace mplug2::frames
