// The forward pass of local_temporal as two products of ours. down: hidden = LN(x) down_weight^T + down_bias of a tile
// that holds whole videos' positions, and act = QuickGELU(conv(hidden)) before the tile leaves shared memory. up: out =
// x + act up_weight^T + up_bias. Rows of the prefix never enter a product.
#pragma once
#include "local_temporal/local_temporal_mix.cuh"

namespace mplug2::local_temporal {

constexpr int kTileM = 128, kTileN = 256, kTileK = 32;  // rows, columns, and numbers of a row that a stage holds
constexpr int kProductThreads = 256;                    // eight warps of 64 x 64: two over the rows, four over columns
constexpr int kProductWarps = kProductThreads / kWarp;
constexpr int kStages = 4;
constexpr int kMaxProductWidth = 4096;
constexpr int kStatRows = 4;  // whose statistics a warp makes at a time: their loads are in flight together
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
constexpr int kTileStride = kTileN + kChunk;  // of a row of a tile of hidden or out, in numbers: rows on other banks
constexpr int kStepChunks = kTileK / kChunk;

// Behind the stages: for each row of the tile its row of the product's left side, -1 for none, and in the product down
// 1 / deviation and -mean / deviation. A tile of hidden or out lies where the stages were.
constexpr int kProductSharedBytes = kStages * kStageBytes + kTileM * 12;
static_assert(kTileM * kTileStride * 2 <= kStages * kStageBytes);

MPLUG2_DEVICE int* row_table() { return reinterpret_cast<int*>(shared_memory() + kStages * kStageBytes); }
MPLUG2_DEVICE float* row_stats() { return reinterpret_cast<float*>(row_table() + kTileM); }

struct ProductShape {
  int64_t videos;
  int frames, tokens, prefix;  // prefix < tokens
  int width, hidden;           // multiples of 8; every pointer is aligned to 16 bytes
  float eps;

  MPLUG2_DEVICE int64_t positions() const { return videos * (tokens - prefix); }
};

// Which row of x a row of a tile is. Tiles hold all frames of some positions, or, where there are more than kTileM
// frames, kTileM consecutive ones of a position, of which the first and the last are there for their neighbours only.
struct TileRows {
  int frames, tokens, prefix;
  int64_t positions, first_position;
  int first_frame, frames_held;  // of each position of this tile

  MPLUG2_DEVICE TileRows(const ProductShape& shape, int64_t tile)
      : frames(shape.frames), tokens(shape.tokens), prefix(shape.prefix), positions(shape.positions()) {
    if (frames <= kTileM) {
      first_position = tile * (kTileM / frames);
      first_frame = 0;
      frames_held = frames;
    } else {
      const int pieces = (frames + kTileM - 3) / (kTileM - 2);
      first_position = tile / pieces;
      first_frame = static_cast<int>(tile % pieces) * (kTileM - 2) - 1;
      frames_held = kTileM;
    }
  }
  MPLUG2_DEVICE int frame(int r) const { return first_frame + r % frames_held; }
  // Row of x, or -1 where the tile's row is none.
  MPLUG2_DEVICE int row(int r) const {
    const int64_t position = first_position + r / frames_held;
    const int f = frame(r);
    if (r >= kTileM / frames_held * frames_held || position >= positions || f < 0 || f >= frames) return -1;
    const int patches = tokens - prefix;
    return static_cast<int>((position / patches * frames + f) * tokens + prefix + position % patches);
  }
  // Whether this tile is the one that writes the row.
  MPLUG2_DEVICE bool is_own(int r) const { return frames <= kTileM || (r > 0 && r < kTileM - 1); }
};

inline int64_t num_tiles(int64_t positions, int frames) {
  if (frames <= kTileM) return (positions + kTileM / frames - 1) / (kTileM / frames);
  return positions * ((frames + kTileM - 3) / (kTileM - 2));
}

// Chunk c (of four) of row r of a stage. Two rows share 128 bytes; eight rows of a column of chunks lie in all banks.
MPLUG2_DEVICE unsigned char* step_chunk(unsigned char* tile, int r, int c) {
  return tile + r * (kTileK * 2) + ((c ^ (r / 2 % 4)) * 16);
}

// sum += the rows of a in row_table(), zeros for none, times columns [first_column, first_column + kTileN) of weight
// (n, k) transposed. change(stage, step): turns a stage of a that has landed into what is multiplied, by all threads.
template <class T, class Change>
MPLUG2_DEVICE void multiply(float (&sum)[4][8][4], const T* a, int k, const T* weight, int first_column, int columns,
                            const Change& change) {
  unsigned char* shared = shared_memory();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = warp % 2 * 64, column = warp / 2 * 64;
  const int steps = (k + kTileK - 1) / kTileK;
  constexpr int kRowsAtOnce = kProductThreads / kStepChunks;  // 64
  const int c = threadIdx.x % kStepChunks, r0 = threadIdx.x / kStepChunks;
  int rows[kTileM / kRowsAtOnce];
  MPLUG2_UNROLL
  for (int i = 0; i < kTileM / kRowsAtOnce; ++i) rows[i] = row_table()[r0 + i * kRowsAtOnce];

  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % kStages * kStageBytes;
      const int at = step * kTileK + c * kChunk;
      MPLUG2_UNROLL
      for (int i = 0; i < kTileM / kRowsAtOnce; ++i) {
        const bool is_valid = rows[i] >= 0 && at < k;
        cp_async16(step_chunk(stage, r0 + i * kRowsAtOnce, c),
                   is_valid ? a + static_cast<int64_t>(rows[i]) * k + at : a, is_valid);
      }
      stage += kTileM * kTileK * 2;
      MPLUG2_UNROLL
      for (int i = 0; i < kTileN / kRowsAtOnce; ++i) {
        const int n = first_column + r0 + i * kRowsAtOnce;
        const bool is_valid = n < columns && at < k;
        cp_async16(step_chunk(stage, r0 + i * kRowsAtOnce, c),
                   is_valid ? weight + static_cast<int64_t>(n) * k + at : weight, is_valid);
      }
    }
    cp_async_commit();  // empty beyond the last step, so that the count stays
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  cp_async_wait<kStages - 2>();
  __syncthreads();
  change(shared, 0);

  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 3>();
    __syncthreads();  // step + 1 has landed, step is changed, and step - 1 is read by no one
    load(step + kStages - 1);
    if (step + 1 < steps) change(shared + (step + 1) % kStages * kStageBytes, step + 1);
    unsigned char *a_tile = shared + step % kStages * kStageBytes, *b_tile = a_tile + kTileM * kTileK * 2;
    MPLUG2_UNROLL
    for (int half = 0; half < kTileK / 16; ++half) {
      uint32_t left[4][4], right[4][4];
      MPLUG2_UNROLL
      for (int i = 0; i < 4; ++i)
        ldmatrix_x4(left[i], step_chunk(a_tile, row + i * 16 + lane % 16, half * 2 + lane / 16));
      MPLUG2_UNROLL
      for (int j = 0; j < 4; ++j)
        ldmatrix_x4(right[j], step_chunk(b_tile, column + j * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
      MPLUG2_UNROLL
      for (int i = 0; i < 4; ++i) MPLUG2_UNROLL
      for (int j = 0; j < 8; ++j)
        mma_m16n8k16<T>(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free
}

// Where in a tile this thread's fragments lie: row i * 16 + half * 8 and columns j * 8 on from here.
struct FragmentPlace {
  int row, column;
  MPLUG2_DEVICE FragmentPlace() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    row = warp % 2 * 64 + lane / 4;
    column = warp / 2 * 64 + lane % 4 * 2;
  }
  template <class T>
  MPLUG2_DEVICE uint32_t* pair(int i, int half, int j) const {
    T* tile = reinterpret_cast<T*>(shared_memory());
    return reinterpret_cast<uint32_t*>(tile + (row + i * 16 + half * 8) * kTileStride + column + j * 8);
  }
};

template <class T>
struct DownParams {
  const T *x, *ln_weight, *ln_bias, *weight, *bias, *conv_weight, *conv_bias;
  T* hidden;  // (rows, hidden), or null; bias in prefix rows
  T* act;     // (rows, hidden); prefix rows are not written
  ProductShape shape;
  int columns_of_block;  // a multiple of kTileN; what statistics are made once for
};

// row_stats() of the tile's rows. Mean, then centred squares: digits survive an offset far above the spread; the second
// reading is of the L1 cache. A row that is none has the first one's: what becomes of it nobody reads.
template <class T>
MPLUG2_DEVICE void make_stats(const DownParams<T>& p) {
  const ProductShape& shape = p.shape;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, chunks = shape.width / kChunk;
  const int* table = row_table();
  float* stats = row_stats();
  const float inverse_width = 1.0f / static_cast<float>(shape.width);
  for (int r = warp * kStatRows; r < kTileM; r += kProductWarps * kStatRows) {
    const T* x[kStatRows];
    float mean[kStatRows] = {}, squares[kStatRows] = {}, values[kChunk];
    MPLUG2_UNROLL
    for (int i = 0; i < kStatRows; ++i) x[i] = p.x + static_cast<int64_t>(max(table[r + i], 0)) * shape.width;
    for (int c = lane; c < chunks; c += kWarp) MPLUG2_UNROLL
    for (int i = 0; i < kStatRows; ++i) {
      unpack_chunk<T>(load16(x[i] + c * kChunk), values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) mean[i] += values[j];
    }
    MPLUG2_UNROLL
    for (int i = 0; i < kStatRows; ++i) mean[i] = warp_sum(mean[i]) * inverse_width;
    for (int c = lane; c < chunks; c += kWarp) MPLUG2_UNROLL
    for (int i = 0; i < kStatRows; ++i) {
      unpack_chunk<T>(load16(x[i] + c * kChunk), values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) squares[i] += (values[j] - mean[i]) * (values[j] - mean[i]);
    }
    MPLUG2_UNROLL
    for (int i = 0; i < kStatRows; ++i) {
      const float rstd = rsqrtf(warp_sum(squares[i]) * inverse_width + shape.eps);
      if (lane == 0) store_pair(stats + (r + i) * 2, rstd, -mean[i] * rstd);
    }
  }
}

// act, and hidden if it is kept, of the tile of hidden. A warp takes consecutive rows, a lane eight channels of them.
template <class T>
MPLUG2_DEVICE void mix_tile(const DownParams<T>& p, const TileRows& rows, int first_column) {
  const ProductShape& shape = p.shape;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int* table = row_table();
  const int column = lane * kChunk, channel = first_column + column, first_row = warp * kTileM / kProductWarps;
  if (channel >= shape.hidden) return;
  const T* tile = reinterpret_cast<const T*>(shared_memory()) + column;
  const Taps<T> taps(p.conv_weight, p.conv_bias, channel);
  float before[kChunk] = {}, here[kChunk], after[kChunk];
  if (first_row > 0) unpack_chunk<T>(load16(tile + (first_row - 1) * kTileStride), before);
  uint4 chunk = load16(tile + first_row * kTileStride);
  unpack_chunk<T>(chunk, here);
  int frame = rows.frame(first_row);
  for (int r = first_row; r < first_row + kTileM / kProductWarps; ++r, ++frame) {
    if (frame == rows.first_frame + rows.frames_held) frame = rows.first_frame;
    const uint4 next = r + 1 < kTileM ? load16(tile + (r + 1) * kTileStride) : zero_chunk();
    unpack_chunk<T>(next, after);
    const int64_t row = table[r];
    if (row >= 0 && rows.is_own(r)) {
      float values[kChunk];
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) {
        const float mixed = taps.bias[j] + taps.weight[0][j] * (frame > 0 ? before[j] : 0.0f) +
                            taps.weight[1][j] * here[j] +
                            taps.weight[2][j] * (frame + 1 < shape.frames ? after[j] : 0.0f);
        values[j] = QuickGelu::value(mixed);
      }
      store16(p.act + row * shape.hidden + channel, pack_chunk<T>(values));
      if (p.hidden != nullptr) {
        T* hidden = p.hidden + row * shape.hidden + channel;
        store16(hidden, chunk);
        if (static_cast<int>(row) % shape.tokens == shape.prefix)  // whose tile writes the prefix before it
          for (int i = 1; i <= shape.prefix; ++i)
            store16(hidden - static_cast<int64_t>(i) * shape.hidden, load16(p.bias + channel));
      }
    }
    copy_chunk(before, here);
    copy_chunk(here, after);
    chunk = next;
  }
}

// Blocks: the columns of a tile of rows one after the other, in pieces of columns_of_block.
template <class T>
MPLUG2_KERNEL(kProductThreads, 1)
down_kernel(DownParams<T> p) {
  const ProductShape& shape = p.shape;
  const int pieces = (shape.hidden + p.columns_of_block - 1) / p.columns_of_block;
  const int start = blockIdx.x % pieces * p.columns_of_block, end = min(start + p.columns_of_block, shape.hidden);
  const TileRows rows(shape, blockIdx.x / pieces);
  const float* stats = row_stats();
  if (threadIdx.x < kTileM) row_table()[threadIdx.x] = rows.row(threadIdx.x);
  __syncthreads();
  make_stats(p);
  __syncthreads();

  const auto normalise = [&](unsigned char* stage, int step) {
    const int c = threadIdx.x % kStepChunks, at = step * kTileK + c * kChunk;
    if (at >= shape.width) return;
    float scale[kChunk], shift[kChunk], values[kChunk];
    unpack_chunk<T>(load16(p.ln_weight + at), scale);
    unpack_chunk<T>(load16(p.ln_bias + at), shift);
    for (int r = threadIdx.x / kStepChunks; r < kTileM; r += kProductThreads / kStepChunks) {
      unsigned char* chunk = step_chunk(stage, r, c);
      const float rstd = stats[r * 2], centre = stats[r * 2 + 1];
      unpack_chunk<T>(load16(chunk), values);
      MPLUG2_UNROLL
      for (int j = 0; j < kChunk; ++j) values[j] = (values[j] * rstd + centre) * scale[j] + shift[j];
      store16(chunk, pack_chunk<T>(values));
    }
  };
  for (int first_column = start; first_column < end; first_column += kTileN) {
    float sum[4][8][4] = {};
    multiply<T>(sum, p.x, shape.width, p.weight, first_column, shape.hidden, normalise);
    const FragmentPlace place;
    MPLUG2_UNROLL
    for (int j = 0; j < 8; ++j) {
      const int column = first_column + place.column + j * 8;
      if (column >= shape.hidden) continue;
      const float2 bias = unpack<T>(*reinterpret_cast<const uint32_t*>(p.bias + column));
      MPLUG2_UNROLL
      for (int i = 0; i < 4; ++i) MPLUG2_UNROLL
      for (int half = 0; half < 2; ++half)
        *place.pair<T>(i, half, j) = pack<T>(sum[i][j][half * 2] + bias.x, sum[i][j][half * 2 + 1] + bias.y);
    }
    __syncthreads();
    mix_tile(p, rows, first_column);
    __syncthreads();  // the stages are free
  }
}

template <class T>
struct UpParams {
  const T *x, *act, *weight, *bias;
  T* out;
  ProductShape shape;
  int64_t rows;  // of x, prefix included
};

// Tiles are kTileM consecutive rows of x: a prefix row among them is zeros to the product, and x in out.
template <class T>
MPLUG2_KERNEL(kProductThreads, 1)
up_kernel(UpParams<T> p) {
  const ProductShape& shape = p.shape;
  const int column_tiles = (shape.width + kTileN - 1) / kTileN, first_column = blockIdx.x % column_tiles * kTileN;
  const int64_t first = static_cast<int64_t>(blockIdx.x / column_tiles) * kTileM;
  int* table = row_table();
  if (threadIdx.x < kTileM) {
    const int64_t row = first + threadIdx.x;
    const bool is_in = row < p.rows && static_cast<int>(row) % shape.tokens >= shape.prefix;
    table[threadIdx.x] = is_in ? static_cast<int>(row) : -1;
  }
  __syncthreads();
  float sum[4][8][4] = {};
  multiply<T>(sum, p.act, shape.hidden, p.weight, first_column, shape.width, [](unsigned char*, int) {});

  // x comes into a tile, and out takes its place there: whole rows to and from memory, and one rounding.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = first_column + lane * kChunk;
  T* tile = reinterpret_cast<T*>(shared_memory()) + lane * kChunk;
  const int rows = column < shape.width ? static_cast<int>(min(p.rows - first, int64_t{kTileM})) : 0;
  const auto at = [&](int r) { return (first + r) * shape.width + column; };
  for (int r = warp; r < rows; r += kProductWarps) cp_async16(tile + r * kTileStride, p.x + at(r));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const FragmentPlace place;
  MPLUG2_UNROLL
  for (int j = 0; j < 8; ++j) {
    if (first_column + place.column + j * 8 >= shape.width) continue;
    const float2 bias = unpack<T>(*reinterpret_cast<const uint32_t*>(p.bias + first_column + place.column + j * 8));
    MPLUG2_UNROLL
    for (int i = 0; i < 4; ++i) MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (table[place.row + i * 16 + half * 8] < 0) continue;
      uint32_t* pair = place.pair<T>(i, half, j);
      const float2 x = unpack<T>(*pair);
      *pair = pack<T>(sum[i][j][half * 2] + bias.x + x.x, sum[i][j][half * 2 + 1] + bias.y + x.y);
    }
  }
  __syncthreads();
  for (int r = warp; r < rows; r += kProductWarps) store16(p.out + at(r), load16(tile + r * kTileStride));
}

}  // namespace mplug2::local_temporal
