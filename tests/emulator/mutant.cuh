// An attention kernel that can be broken in many ways, each the kind of mistake one makes: tests hold that every one is
// noticed (tests/test_mutation.py). It uses what real kernels use: a ring of cp.async tiles filled by a warp of its
// own, named barriers, ldmatrix, mma, online softmax, a staged store, atomics.
#pragma once
#include "core/device.h"

namespace mplug2::mutant {

enum class Mutation {
  kNone,
  kNoBlockBarrier,     // Q is read before the other warps' copies are known to be there
  kLaxWait,            // a tile is handed over while it is in flight
  kNoWait,             // Q is read while it is in flight
  kNoSyncwarp,         // the staged output is read before its lanes are known to have stored
  kNoEmptyBarrier,     // a stage is filled again while it is read
  kWrongCount,         // a barrier counts too few threads
  kMissedBarrier,      // a warp does not come to a barrier
  kNoSumBarrier,       // partial sums of other warps are read too early
  kDivergentShuffle,   // some lanes do not come to a shuffle
  kIndex,              // the halves of V's tile change places
  kMask,               // one key too many
  kScale,              // e instead of 2 as the base
  kNoRescale,          // the sums of earlier tiles keep their old maximum
  kTail,               // rows beyond the last query are stored
  kStride,             // heads of K are as far apart as those of Q
  kMisaligned,         // a row begins at 8 bytes
  kUnreadRange,        // the last tile of V is not loaded
  kPastTheEnd,         // a row beyond K is read
  kOverrun,            // the partial sums end behind shared memory
  kConflictingLayout,  // rows without swizzle
  kLoadedTwice,        // every tile of K is loaded twice
  kWastedProducts,     // a tile more than there are keys
  kRacingGradient,     // += instead of an atomic
  kThroughGlobal,      // the sum of the output is read from the output just stored by others
};

constexpr int kHead = 64, kQueries = 64, kKeys = 32;  // of a tile; numbers in a row
constexpr int kChunk = 8;                             // numbers in 16 bytes
constexpr int kConsumers = 4;                         // warps, 16 queries each; one more loads K and V
constexpr int kThreads = (kConsumers + 1) * kWarp;
constexpr int kStages = 2;
constexpr int kFull = 0, kEmpty = kFull + kStages, kSums = kEmpty + kStages;  // named barriers
constexpr int kSharedBytes = (kQueries + 2 * kStages * kKeys) * kHead * 2 + kConsumers * kHead * 4;

template <class T>
struct Params {
  const T* q;    // (heads, queries, kHead)
  const T* k;    // (heads, keys, kHead)
  const T* v;    // (heads, keys, kHead)
  T* out;        // (heads, queries, kHead)
  float* total;  // (kHead): the sum of out over heads and queries, zero before
  int queries, keys;
  float scale_log2;  // scale log2(e)
  Mutation mutation;
};

template <class T>
class Kernel {
 public:
  MPLUG2_DEVICE explicit Kernel(const Params<T>& p)
      : p_(p),
        warp_(threadIdx.x / kWarp),
        lane_(threadIdx.x % kWarp),
        first_query_(blockIdx.x * kQueries),
        head_(blockIdx.y),
        num_tiles_((p.keys + kKeys - 1) / kKeys + is(Mutation::kWastedProducts)),
        q_tile_(reinterpret_cast<T*>(shared_memory())),
        k_ring_(q_tile_ + kQueries * kHead),
        v_ring_(k_ring_ + kStages * kKeys * kHead),
        sums_(reinterpret_cast<float*>(v_ring_ + kStages * kKeys * kHead)) {}

  MPLUG2_DEVICE void run() {
    if (warp_ < kConsumers) load_queries();
    if (!is(Mutation::kNoBlockBarrier)) __syncthreads();
    if (warp_ == kConsumers)
      load_keys();
    else
      attend();
  }

 private:
  MPLUG2_DEVICE bool is(Mutation mutation) const { return p_.mutation == mutation; }

  // 16-byte chunks of a row change places by the row, so that the 8 rows of a matrix lie on different banks.
  MPLUG2_DEVICE int at(int row, int chunk) const {
    return row * kHead + (is(Mutation::kConflictingLayout) ? chunk : chunk ^ row % kChunk) * kChunk;
  }

  MPLUG2_DEVICE void load_queries() const {
    const T* q = p_.q + (static_cast<int64_t>(head_) * p_.queries + first_query_) * kHead;
    for (int i = threadIdx.x; i < kQueries * kHead / kChunk; i += kConsumers * kWarp) {
      const int row = i / (kHead / kChunk), chunk = i % (kHead / kChunk);
      const bool is_valid = first_query_ + row < p_.queries;
      cp_async16(q_tile_ + at(row, chunk), is_valid ? q + row * kHead + chunk * kChunk : p_.q, is_valid);
    }
    cp_async_commit();
    if (!is(Mutation::kNoWait)) cp_async_wait<0>();
  }

  MPLUG2_DEVICE void load_tile(T* tile, const T* from, int first) const {
    for (int i = lane_; i < kKeys * kHead / kChunk; i += kWarp) {
      const int row = i / (kHead / kChunk), chunk = i % (kHead / kChunk);
      const bool is_valid = first + row < p_.keys + is(Mutation::kPastTheEnd);
      const int64_t offset =
          static_cast<int64_t>(first + row) * kHead + chunk * kChunk + (is(Mutation::kMisaligned) ? 4 : 0);
      cp_async16(tile + at(row, chunk), is_valid ? from + offset : from, is_valid);
    }
  }

  // The loading warp: tile after tile, one in flight while the one before is handed over.
  MPLUG2_DEVICE void load_keys() const {
    const int64_t head = static_cast<int64_t>(head_) * p_.keys * kHead;
    const T* k = p_.k + (is(Mutation::kStride) ? static_cast<int64_t>(head_) * p_.queries * kHead : head);
    const T* v = p_.v + head;
    for (int tile = 0; tile < num_tiles_; ++tile) {
      const int stage = tile % kStages;
      if (tile >= kStages && !is(Mutation::kNoEmptyBarrier)) named_barrier_sync(kEmpty + stage, kThreads);
      T* k_tile = k_ring_ + stage * kKeys * kHead;
      load_tile(k_tile, k, tile * kKeys);
      if (is(Mutation::kLoadedTwice)) {
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        load_tile(k_tile, k, tile * kKeys);
      }
      if (!(is(Mutation::kUnreadRange) && tile == num_tiles_ - 1))
        load_tile(v_ring_ + stage * kKeys * kHead, v, tile * kKeys);
      cp_async_commit();
      if (tile == 0) continue;
      if (is(Mutation::kLaxWait))
        cp_async_wait<2>();
      else
        cp_async_wait<1>();
      named_barrier_arrive(kFull + (tile - 1) % kStages, kThreads);
    }
    cp_async_wait<0>();
    named_barrier_arrive(kFull + (num_tiles_ - 1) % kStages, kThreads);
  }

  MPLUG2_DEVICE void attend() const {
    uint32_t q[kHead / 16][4];
    MPLUG2_UNROLL
    for (int i = 0; i < kHead / 16; ++i) ldmatrix_x4(q[i], q_tile_ + at(warp_ * 16 + lane_ % 16, 2 * i + lane_ / 16));

    // Rows lane / 4 and 8 below: largest score, sum of exponentials, weighted sum of V.
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, out[kHead / 8][4] = {};
    for (int tile = 0; tile < num_tiles_; ++tile) {
      const int stage = tile % kStages;
      if (!(is(Mutation::kMissedBarrier) && warp_ == 1 && tile == 1))
        named_barrier_sync(kFull + stage, kThreads - (is(Mutation::kWrongCount) ? kWarp : 0));
      const T *k_tile = k_ring_ + stage * kKeys * kHead, *v_tile = v_ring_ + stage * kKeys * kHead;

      // scores, masked
      float s[kKeys / 8][4] = {};
      MPLUG2_UNROLL
      for (int i = 0; i < kHead / 16; ++i) {
        MPLUG2_UNROLL
        for (int j = 0; j < kKeys / 8; j += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, k_tile + at(8 * j + lane_ / 16 * 8 + lane_ % 8, 2 * i + lane_ / 8 % 2));
          mma_m16n8k16<T>(s[j], q[i], b[0], b[1]);
          mma_m16n8k16<T>(s[j + 1], q[i], b[2], b[3]);
        }
      }
      MPLUG2_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) {
        MPLUG2_UNROLL
        for (int i = 0; i < 4; ++i)
          if (tile * kKeys + 8 * j + lane_ % 4 * 2 + i % 2 >= p_.keys + is(Mutation::kMask)) s[j][i] = -INFINITY;
      }

      // exponentials, and the sums so far brought to the new maximum
      const float scale = is(Mutation::kScale) ? p_.scale_log2 * 0.6931472f : p_.scale_log2;
      MPLUG2_UNROLL
      for (int half = 0; half < 2; ++half) {
        float m = largest[half];
        MPLUG2_UNROLL
        for (int j = 0; j < kKeys / 8; ++j) m = fmaxf(m, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        if (!(is(Mutation::kDivergentShuffle) && lane_ < 4)) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        const float rescale = is(Mutation::kNoRescale) ? 1.0f : exp2_approx((largest[half] - m) * scale);
        largest[half] = m;
        sum[half] *= rescale;
        MPLUG2_UNROLL
        for (int n = 0; n < kHead / 8; ++n) {
          out[n][2 * half] *= rescale;
          out[n][2 * half + 1] *= rescale;
        }
        MPLUG2_UNROLL
        for (int j = 0; j < kKeys / 8; ++j) {
          MPLUG2_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[j][i] = exp2_approx((s[j][i] - m) * scale);
            sum[half] += s[j][i];
          }
        }
      }

      // out += p v
      MPLUG2_UNROLL
      for (int i = 0; i < kKeys / 16; ++i) {
        const uint32_t weights[4] = {pack<T>(s[2 * i][0], s[2 * i][1]), pack<T>(s[2 * i][2], s[2 * i][3]),
                                     pack<T>(s[2 * i + 1][0], s[2 * i + 1][1]),
                                     pack<T>(s[2 * i + 1][2], s[2 * i + 1][3])};
        const int rows = (is(Mutation::kIndex) ? kKeys / 16 - 1 - i : i) * 16;
        MPLUG2_UNROLL
        for (int n = 0; n < kHead / 8; n += 2) {
          uint32_t b[4];
          ldmatrix_x4_transposed(b, v_tile + at(rows + lane_ % 16, n + lane_ / 16));
          mma_m16n8k16<T>(out[n], weights, b[0], b[1]);
          mma_m16n8k16<T>(out[n + 1], weights, b[2], b[3]);
        }
      }
      if (tile + kStages < num_tiles_ && !is(Mutation::kNoEmptyBarrier)) named_barrier_arrive(kEmpty + stage, kThreads);
    }

    MPLUG2_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      MPLUG2_UNROLL
      for (int n = 0; n < kHead / 8; ++n) {
        out[n][2 * half] /= sum[half];
        out[n][2 * half + 1] /= sum[half];
      }
    }
    store(out);
    add_to_total(out);
  }

  // Through the warp's own rows of Q's tile, so that rows leave in 16-byte pieces.
  MPLUG2_DEVICE void store(const float (&out)[kHead / 8][4]) const {
    MPLUG2_UNROLL
    for (int n = 0; n < kHead / 8; ++n) {
      MPLUG2_UNROLL
      for (int half = 0; half < 2; ++half) {
        T* row = q_tile_ + at(warp_ * 16 + lane_ / 4 + 8 * half, n);
        *reinterpret_cast<uint32_t*>(row + lane_ % 4 * 2) = pack<T>(out[n][2 * half], out[n][2 * half + 1]);
      }
    }
    if (!is(Mutation::kNoSyncwarp)) __syncwarp();
    for (int i = lane_; i < 16 * kHead / kChunk; i += kWarp) {
      const int row = warp_ * 16 + i / (kHead / kChunk), chunk = i % (kHead / kChunk);
      if (first_query_ + row >= p_.queries && !is(Mutation::kTail)) continue;
      const int64_t to = static_cast<int64_t>(head_) * p_.queries + first_query_ + row;
      store16(p_.out + to * kHead + chunk * kChunk, load16(q_tile_ + at(row, chunk)));
    }
  }

  MPLUG2_DEVICE void add_to_total(const float (&out)[kHead / 8][4]) const {
    const int row = first_query_ + warp_ * 16 + lane_ / 4;
    float* sums = sums_ + (is(Mutation::kOverrun) ? warp_ + 1 : warp_) * kHead;
    MPLUG2_UNROLL
    for (int n = 0; n < kHead / 8; ++n) {
      MPLUG2_UNROLL
      for (int i = 0; i < 2; ++i) {
        float x = (row < p_.queries ? out[n][i] : 0) + (row + 8 < p_.queries ? out[n][2 + i] : 0);
        for (int distance = 4; distance < kWarp; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
        if (lane_ < 4) sums[8 * n + 2 * lane_ + i] = x;
      }
    }
    if (!is(Mutation::kNoSumBarrier)) named_barrier_sync(kSums, kConsumers * kWarp);
    if (threadIdx.x >= kHead) return;
    float x = 0;
    for (int warp = 0; warp < kConsumers; ++warp) x += sums_[warp * kHead + threadIdx.x];
    if (is(Mutation::kThroughGlobal))
      x += to_float(p_.out[(static_cast<int64_t>(head_) * p_.queries + first_query_) * kHead + threadIdx.x]);
    if (is(Mutation::kRacingGradient))
      p_.total[threadIdx.x] += x;
    else
      atomicAdd(p_.total + threadIdx.x, x);
  }

  const Params<T>& p_;
  const int warp_, lane_, first_query_, head_, num_tiles_;
  T *const q_tile_, *const k_ring_, *const v_ring_;
  float* const sums_;  // (kConsumers, kHead)
};

template <class T>
MPLUG2_KERNEL(kThreads, 1)
attention_kernel(Params<T> p) {
  Kernel<T>(p).run();
}

}  // namespace mplug2::mutant
