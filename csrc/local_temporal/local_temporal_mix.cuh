// Between the products of local_temporal: mixed = the depthwise convolution of hidden over time, act =
// QuickGELU(mixed); backward dmixed = dact QuickGELU'(mixed), dhidden = the transposed convolution of dmixed, and the
// sums for the convolution's parameters. A thread takes eight channels of a token through up to kFrames frames, so that
// every frame is read once and dmixed never leaves the registers.
#pragma once
#include "core/activation.cuh"
#include "core/column_sums.cuh"

namespace mplug2::local_temporal {

// Frames of a thread. Videos with more are cut into pieces of this many, which read a frame (backward: and act, two of
// hidden) beyond either end.
constexpr int kFrames = 16;
constexpr int kLoads = 4;  // frames in flight while as many are worked on

struct MixShape {
  int64_t videos;
  int frames;  // of a video
  int tokens;  // of a frame, prefix included
  int prefix;
  int hidden;  // a multiple of 8; every pointer is aligned to 16 bytes
};

// One token of one piece of a video.
struct MixItem {
  int64_t video;
  int token;
  int first, last;  // frames

  MPLUG2_DEVICE MixItem(const MixShape& shape, int64_t index) {
    const int pieces = (shape.frames + kFrames - 1) / kFrames;
    token = static_cast<int>(index % shape.tokens);
    index /= shape.tokens;
    first = static_cast<int>(index % pieces) * kFrames;
    last = min(first + kFrames, shape.frames);
    video = index / pieces;
  }
  // Row of the token in `frame`.
  MPLUG2_DEVICE int64_t row(const MixShape& shape, int frame) const {
    return (video * shape.frames + frame) * shape.tokens + token;
  }
};
inline int64_t mix_items(const MixShape& shape) {
  return shape.videos * ((shape.frames + kFrames - 1) / kFrames) * shape.tokens;
}

// Of eight channels. The weights (8, 3) are 48 bytes of conv_weight (hidden, 3).
template <class T>
struct Taps {
  float weight[3][kChunk], bias[kChunk];

  MPLUG2_DEVICE Taps(const T* conv_weight, const T* conv_bias, int channel) {
    MPLUG2_UNROLL
    for (int part = 0; part < 3; ++part) {
      float values[kChunk];
      unpack_chunk<T>(load16(conv_weight + channel * 3 + part * kChunk), values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) {
        const int at = part * kChunk + j;
        weight[at % 3][at / 3] = values[j];
      }
    }
    unpack_chunk<T>(load16(conv_bias + channel), bias);
  }
};

// The frame, where the video has it.
template <class T>
MPLUG2_DEVICE uint4 load_frame(const MixShape& shape, const MixItem& item, const T* hidden, int frame, int channel) {
  if (frame < 0 || frame >= shape.frames) return zero_chunk();
  return load16(hidden + item.row(shape, frame) * shape.hidden + channel);
}

MPLUG2_DEVICE void copy_chunk(float (&to)[kChunk], const float (&from)[kChunk]) {
  MPLUG2_UNROLL
  for (int j = 0; j < kChunk; ++j) to[j] = from[j];
}

template <class T>
struct MixParams {
  const T* hidden;       // (rows, hidden)
  const T* conv_weight;  // (hidden, 3)
  const T* conv_bias;    // (hidden)
  T* act;                // (rows, hidden + 8): one more chunk of channels, 1 0 0 ..., through which the product up adds
                         // its bias; all 0 in prefix rows
  MixShape shape;
};

constexpr int kMixThreads = 128;
constexpr int kMixBlocks = 3;  // a multiprocessor: 24 KB of loads in flight; four spill on 10.0

// A thread takes one chunk of channels of one item, and then the one gridDim.x * kMixThreads further.
template <class T>
MPLUG2_KERNEL(kMixThreads, kMixBlocks)
mix_kernel(MixParams<T> p) {
  const MixShape& shape = p.shape;
  const int chunks = shape.hidden / kChunk + 1, pieces = (shape.frames + kFrames - 1) / kFrames;
  const int64_t count = shape.videos * pieces * shape.tokens * chunks;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kMixThreads + threadIdx.x; index < count;
       index += static_cast<int64_t>(gridDim.x) * kMixThreads) {
    const MixItem item(shape, index / chunks);
    const int channel = static_cast<int>(index % chunks) * kChunk;
    T* act = p.act + channel;
    const int64_t stride = shape.hidden + kChunk;  // of act
    if (item.token < shape.prefix || channel == shape.hidden) {
      const float unit[kChunk] = {item.token < shape.prefix ? 0.0f : 1.0f};
      for (int frame = item.first; frame < item.last; ++frame)
        store16(act + item.row(shape, frame) * stride, pack_chunk<T>(unit));
      continue;
    }
    const Taps<T> taps(p.conv_weight, p.conv_bias, channel);
    float before[kChunk], here[kChunk], after[kChunk];
    unpack_chunk<T>(load_frame(shape, item, p.hidden, item.first - 1, channel), before);
    unpack_chunk<T>(load_frame(shape, item, p.hidden, item.first, channel), here);
    uint4 next[kLoads], ahead[kLoads];
    const auto load = [&](uint4(&frames)[kLoads], int start) {  // those after start, start + 1, ...
      MPLUG2_UNROLL
      for (int i = 0; i < kLoads; ++i)
        frames[i] = start + i < item.last ? load_frame(shape, item, p.hidden, start + i + 1, channel) : zero_chunk();
    };
    load(ahead, item.first);
    for (int start = item.first; start < item.last; start += kLoads) {
      MPLUG2_UNROLL
      for (int i = 0; i < kLoads; ++i) next[i] = ahead[i];
      load(ahead, start + kLoads);
      MPLUG2_UNROLL
      for (int i = 0; i < kLoads; ++i)
        if (start + i < item.last) {
          unpack_chunk<T>(next[i], after);
          float values[kChunk];
          MPLUG2_UNROLL
          for (int j = 0; j < kChunk; ++j) {
            const float mixed = taps.bias[j] + taps.weight[0][j] * before[j] + taps.weight[1][j] * here[j] +
                                taps.weight[2][j] * after[j];
            values[j] = QuickGelu::value(mixed);
          }
          store16(act + item.row(shape, start + i) * stride, pack_chunk<T>(values));
          copy_chunk(before, here);
          copy_chunk(here, after);
        }
    }
  }
}

template <class T>
struct MixBwdParams {
  const T* hidden;       // (rows, hidden)
  const T* dact;         // (rows, hidden)
  const T* conv_weight;  // (hidden, 3)
  const T* conv_bias;    // (hidden)
  T* act;                // (rows, hidden)
  T* dhidden;            // (rows, hidden)
  float* parts;          // (gridDim.y, kMixSums, hidden): of dconv_weight's three taps, dconv_bias, ddown_bias
  MixShape shape;
};

constexpr int kMixSums = 5;
constexpr int kMixBwdThreads = 128;
constexpr int kMixBwdBlocks = 2;  // a multiprocessor; three spill on 10.0
constexpr int kMixBwdWarps = kMixBwdThreads / kWarp;
constexpr int kBwdLoads = 2;  // frames in flight, of two tensors, while as many are worked on

// Block (x, y): 256 channels; a warp takes items in turn.
template <class T>
MPLUG2_KERNEL(kMixBwdThreads, kMixBwdBlocks)
mix_bwd_kernel(MixBwdParams<T> p) {
  const MixShape& shape = p.shape;
  const int channel = (blockIdx.x * kWarp + threadIdx.x % kWarp) * kChunk;
  const bool is_valid = channel < shape.hidden;
  const int64_t items = shape.videos * ((shape.frames + kFrames - 1) / kFrames) * shape.tokens;
  float dtaps[3][kChunk] = {}, dconv_bias[kChunk] = {}, ddown_bias[kChunk] = {};
  const Taps<T> taps(p.conv_weight, p.conv_bias, is_valid ? channel : 0);

  for (int64_t index = static_cast<int64_t>(blockIdx.y) * kMixBwdWarps + threadIdx.x / kWarp; is_valid && index < items;
       index += static_cast<int64_t>(gridDim.y) * kMixBwdWarps) {
    const MixItem item(shape, index);
    if (item.token < shape.prefix) {
      for (int frame = item.first; frame < item.last; ++frame) {
        const int64_t at = item.row(shape, frame) * shape.hidden + channel;
        store16(p.act + at, zero_chunk());
        store16(p.dhidden + at, zero_chunk());
      }
      continue;
    }
    // Frame by frame from the one before the piece to the one after it: dmixed of the last three gives dhidden of the
    // middle one. dmixed is 0 outside the video.
    float before[kChunk], here[kChunk], after[kChunk];           // hidden
    float dmixed_before[kChunk] = {}, dmixed_here[kChunk] = {};  // of frames - 2 and - 1
    unpack_chunk<T>(load_frame(shape, item, p.hidden, item.first - 2, channel), before);
    unpack_chunk<T>(load_frame(shape, item, p.hidden, item.first - 1, channel), here);
    uint4 next[kBwdLoads], next_ahead[kBwdLoads], dact[kBwdLoads], dact_ahead[kBwdLoads];
    const auto load = [&](int start) {
      MPLUG2_UNROLL
      for (int i = 0; i < kBwdLoads; ++i) {
        const bool is_wanted = start + i <= item.last;
        next_ahead[i] = is_wanted ? load_frame(shape, item, p.hidden, start + i + 1, channel) : zero_chunk();
        dact_ahead[i] = is_wanted ? load_frame(shape, item, p.dact, start + i, channel) : zero_chunk();
      }
    };
    load(item.first - 1);
    for (int start = item.first - 1; start <= item.last; start += kBwdLoads) {
      MPLUG2_UNROLL
      for (int i = 0; i < kBwdLoads; ++i) {
        next[i] = next_ahead[i];
        dact[i] = dact_ahead[i];
      }
      load(start + kBwdLoads);
      MPLUG2_UNROLL
      for (int i = 0; i < kBwdLoads; ++i) {
        const int frame = start + i;
        if (frame > item.last) continue;
        unpack_chunk<T>(next[i], after);
        float dmixed[kChunk] = {};
        if (frame >= 0 && frame < shape.frames) {
          const bool is_own = frame >= item.first && frame < item.last;
          float values[kChunk];
          unpack_chunk<T>(dact[i], dmixed);
          MPLUG2_UNROLL
          for (int j = 0; j < kChunk; ++j) {
            const float mixed = taps.bias[j] + taps.weight[0][j] * before[j] + taps.weight[1][j] * here[j] +
                                taps.weight[2][j] * after[j];
            const auto [value, slope] = QuickGelu::both(mixed);
            values[j] = value;
            dmixed[j] *= slope;
          }
          if (is_own) {
            store16(p.act + item.row(shape, frame) * shape.hidden + channel, pack_chunk<T>(values));
            MPLUG2_UNROLL
            for (int j = 0; j < kChunk; ++j) {
              dtaps[0][j] += dmixed[j] * before[j];
              dtaps[1][j] += dmixed[j] * here[j];
              dtaps[2][j] += dmixed[j] * after[j];
              dconv_bias[j] += dmixed[j];
            }
          }
        }
        if (frame > item.first) {
          float dhidden[kChunk];
          MPLUG2_UNROLL
          for (int j = 0; j < kChunk; ++j) {
            dhidden[j] = taps.weight[0][j] * dmixed[j] + taps.weight[1][j] * dmixed_here[j] +
                         taps.weight[2][j] * dmixed_before[j];
            ddown_bias[j] += dhidden[j];
          }
          store16(p.dhidden + item.row(shape, frame - 1) * shape.hidden + channel, pack_chunk<T>(dhidden));
        }
        copy_chunk(dmixed_before, dmixed_here);
        copy_chunk(dmixed_here, dmixed);
        copy_chunk(before, here);
        copy_chunk(here, after);
      }
    }
  }

  float* parts = p.parts + static_cast<int64_t>(blockIdx.y) * kMixSums * shape.hidden + channel;
  MPLUG2_UNROLL
  for (int k = 0; k < 3; ++k) store_column_sum<kMixBwdWarps>(dtaps[k], parts + k * shape.hidden, is_valid);
  store_column_sum<kMixBwdWarps>(dconv_bias, parts + 3 * shape.hidden, is_valid);
  store_column_sum<kMixBwdWarps>(ddown_bias, parts + 4 * shape.hidden, is_valid);
}

}  // namespace mplug2::local_temporal
