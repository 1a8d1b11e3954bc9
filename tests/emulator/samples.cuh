// Small kernels that test the emulator: what instructions compute, and one mistake each that it must see.
#pragma once
#include "core/device.h"

namespace mplug2::samples {

struct Params {
  const void* x;
  void* y;
  int n;  // numbers in y, or what the kernel takes it for
};

MPLUG2_DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }
MPLUG2_DEVICE const float* in(const Params& p) { return static_cast<const float*>(p.x); }
MPLUG2_DEVICE float* out(const Params& p) { return static_cast<float*>(p.y); }
MPLUG2_DEVICE int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- what instructions compute --------------------------------------------------------------------------------------
// y (12, 32) int32: what each lane gets of the numbers 0 to 31.
inline void shuffles(Params p) {
  int* y = static_cast<int*>(p.y);
  const int lane = threadIdx.x;
  const unsigned all = 0xffffffffu;
  y[lane] = __shfl_sync(all, lane, 5);
  y[32 + lane] = __shfl_sync(all, lane, lane + 1);
  y[64 + lane] = __shfl_xor_sync(all, lane, 3);
  y[96 + lane] = __shfl_up_sync(all, lane, 2);
  y[128 + lane] = __shfl_down_sync(all, lane, 2);
  y[160 + lane] = __shfl_sync(all, lane, 1, 8);
  y[192 + lane] = __shfl_up_sync(all, lane, 3, 8);
  y[224 + lane] = __shfl_down_sync(all, lane, 3, 8);
  y[256 + lane] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
  y[288 + lane] = __any_sync(all, lane == 7) * 2 + __any_sync(all, lane == 32);
  y[320 + lane] = __all_sync(all, lane < 32) * 2 + __all_sync(all, lane < 31);
  y[352 + lane] = lane < 8 ? __shfl_xor_sync(0xffu, lane, 1) : -1;  // part of a warp
}

// x (8 * kMatrices, 8), y (32, kMatrices, 2): the two numbers of each matrix that a lane gets.
template <int kMatrices, bool kIsTransposed>
inline void matrices(Params p) {
  uint16_t* rows = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  if (lane < 8 * kMatrices) store16(rows + lane * 8, load16(static_cast<const uint16_t*>(p.x) + lane * 8));
  __syncwarp();
  uint32_t r[kMatrices];
  const uint16_t* row = rows + lane % (8 * kMatrices) * 8;
  if constexpr (kMatrices == 4 && kIsTransposed) ldmatrix_x4_transposed(r, row);
  if constexpr (kMatrices == 4 && !kIsTransposed) ldmatrix_x4(r, row);
  if constexpr (kMatrices == 2 && kIsTransposed) ldmatrix_x2_transposed(r, row);
  if constexpr (kMatrices == 2 && !kIsTransposed) ldmatrix_x2(r, row);
  for (int i = 0; i < kMatrices; ++i) static_cast<uint32_t*>(p.y)[lane * kMatrices + i] = r[i];
}

// y (16, 8) += a (16, kDepth) b (8, kDepth)^T; x holds a, then b.
template <class T, int kDepth>
inline void product(Params p) {
  const T *a = static_cast<const T*>(p.x), *b = a + 16 * kDepth;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  const auto pair = [](const T* at) { return *reinterpret_cast<const uint32_t*>(at); };
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = out(p)[(g + i / 2 * 8) * 8 + t + i % 2];
  if constexpr (kDepth == 16) {
    const uint32_t fragment[4] = {pair(a + g * 16 + t), pair(a + (g + 8) * 16 + t), pair(a + g * 16 + t + 8),
                                  pair(a + (g + 8) * 16 + t + 8)};
    mma_m16n8k16<T>(d, fragment, pair(b + g * 16 + t), pair(b + g * 16 + t + 8));
  } else {
    const uint32_t fragment[2] = {pair(a + g * 8 + t), pair(a + (g + 8) * 8 + t)};
    mma_m16n8k8<T>(d, fragment, pair(b + g * 8 + t));
  }
  for (int i = 0; i < 4; ++i) out(p)[(g + i / 2 * 8) * 8 + t + i % 2] = d[i];
}

template <class T>
inline void to_floats(Params p) {
  if (global_thread() < p.n) out(p)[global_thread()] = to_float(static_cast<const T*>(p.x)[global_thread()]);
}
template <class T>
inline void from_floats(Params p) {
  if (global_thread() < p.n) static_cast<T*>(p.y)[global_thread()] = from_float<T>(in(p)[global_thread()]);
}
template <class T>
inline void pairs(Params p) {  // packed and unpacked again
  if (global_thread() >= p.n / 2) return;
  const float2 pair = unpack<T>(pack<T>(in(p)[2 * global_thread()], in(p)[2 * global_thread() + 1]));
  out(p)[2 * global_thread()] = pair.x;
  out(p)[2 * global_thread() + 1] = pair.y;
}
inline void exponentials(Params p) {
  if (global_thread() < p.n) out(p)[global_thread()] = exp2_approx(in(p)[global_thread()]);
}
inline void warp_reductions(Params p) {
  out(p)[global_thread()] = warp_sum(in(p)[global_thread()]) + 1000 * warp_max(in(p)[global_thread()]);
}

// ---- right kernels --------------------------------------------------------------------------------------------------
inline void copy(Params p) {
  for (int i = global_thread(); i < p.n; i += static_cast<int>(gridDim.x * blockDim.x)) out(p)[i] = in(p)[i];
}
inline void copy16(Params p) {
  if (4 * global_thread() < p.n) store16(out(p) + 4 * global_thread(), load16(in(p) + 4 * global_thread()));
}
// Only the last number, far away.
inline void touch_last(Params p) {
  if (global_thread() == 0)
    static_cast<uint16_t*>(p.y)[int64_t{p.n} * 1024] = static_cast<const uint16_t*>(p.x)[int64_t{p.n} * 1024];
}
// Three groups of a warp, each copied by cp.async and handed to the next warp by a named barrier.
inline void hand_over(Params p) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, next = (warp + 1) % warps;
  float* own = shared_floats() + threadIdx.x * 4;
  for (int round = 0; round < 3; ++round) {
    cp_async16(own, in(p) + 4 * (round * blockDim.x + threadIdx.x));
    cp_async_commit();
    cp_async_wait<0>();
    named_barrier_arrive(next, 2 * kWarp);
    named_barrier_sync(warp, 2 * kWarp);
    const int before = (threadIdx.x + blockDim.x - kWarp) % blockDim.x;
    store16(out(p) + 4 * (round * blockDim.x + before), load16(shared_floats() + before * 4));
    __syncthreads();
  }
}
// The order in which warps come by: each takes a number.
inline void tickets(Params p) {
  int* next = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *next = 0;
  __syncthreads();
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x % kWarp == 0)
      static_cast<int*>(p.y)[round * (blockDim.x / kWarp) + threadIdx.x / kWarp] = atomicAdd(next, 1);
    __syncwarp();
  }
}
// Constants of the code are no global memory.
inline void table(Params p) {
  static constexpr float kTable[] = {3, 1, 4, 1, 5, 9, 2, 6};
  out(p)[threadIdx.x] = kTable[static_cast<int>(in(p)[threadIdx.x])];
}
// Those that have returned are not waited for.
inline void early_return(Params p) {
  if (threadIdx.x >= 40) return;
  shared_floats()[threadIdx.x] = 1;
  __syncthreads();
  out(p)[threadIdx.x] = shared_floats()[39 - threadIdx.x];
}
// Lanes read shared memory with a stride of p.n words, after 16-byte stores.
inline void strided(Params p) {
  store16(shared_floats() + 4 * threadIdx.x, make_uint4(0, 0, 0, 0));
  __syncthreads();
  out(p)[threadIdx.x] = shared_floats()[threadIdx.x * p.n % (4 * blockDim.x)];
}
// ldmatrix of rows p.n bytes apart.
inline void matrix_rows(Params p) {
  for (int i = threadIdx.x; i < 8 * p.n / 16; i += kWarp) store16(shared_memory() + 16 * i, make_uint4(0, 0, 0, 0));
  __syncwarp();
  uint32_t r[2];
  ldmatrix_x2(r, shared_memory() + threadIdx.x % 8 * p.n);
  static_cast<uint32_t*>(p.y)[threadIdx.x] = r[0];
}
// Warps 0 to 5 multiply once for each of their numbers.
inline void products(Params p) {
  const int warp = threadIdx.x / kWarp;
  float d[4] = {};
  const uint32_t a[4] = {}, a8[2] = {};
  for (int i = 0; i < warp; ++i) mma_m16n8k16<bf16>(d, a, 0, 0);
  mma_m16n8k8<fp16>(d, a8, 0);
  out(p)[threadIdx.x] = d[0];
}

// Every number of shared memory up to 4 a thread is 0, and everybody knows.
MPLUG2_DEVICE void clear() {
  store16(shared_floats() + 4 * threadIdx.x, make_uint4(0, 0, 0, 0));
  __syncthreads();
}

// ---- mistakes in shared memory --------------------------------------------------------------------------------------
inline void race_between_warps(Params p) {
  clear();
  shared_floats()[threadIdx.x] = in(p)[threadIdx.x];
  __syncwarp();
  out(p)[threadIdx.x] = shared_floats()[(threadIdx.x + kWarp) % blockDim.x];
}
inline void race_in_a_warp(Params p) {
  clear();
  shared_floats()[threadIdx.x] = in(p)[threadIdx.x];
  out(p)[threadIdx.x] = shared_floats()[threadIdx.x ^ 1];
}
inline void shuffle_is_no_syncwarp(Params p) {
  clear();
  shared_floats()[threadIdx.x] = in(p)[threadIdx.x];
  const float x = __shfl_xor_sync(0xffffffffu, in(p)[threadIdx.x], 1);
  out(p)[threadIdx.x] = shared_floats()[threadIdx.x ^ 1] + x;
}
inline void ldmatrix_of_unsynced_stores(Params p) {
  clear();
  store16(shared_memory() + 16 * threadIdx.x, make_uint4(0, 0, 0, 0));
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + 16 * threadIdx.x);
  static_cast<uint32_t*>(p.y)[threadIdx.x] = r[0];
}
inline void overwritten_while_read(Params p) {
  clear();
  out(p)[threadIdx.x] = shared_floats()[(threadIdx.x + kWarp) % blockDim.x];
  shared_floats()[threadIdx.x] = 1;
}
inline void two_warps_write(Params p) {
  shared_floats()[threadIdx.x % kWarp] = 1;
  __syncthreads();
  out(p)[threadIdx.x] = shared_floats()[threadIdx.x % kWarp];
}
inline void one_named_barrier_is_not_the_other(Params p) {
  clear();
  const int warp = threadIdx.x / kWarp;  // of four: 0 and 1 meet, 2 and 3 meet, 0 reads what 3 wrote
  shared_floats()[threadIdx.x] = 1;
  named_barrier_sync(warp / 2, 2 * kWarp);
  out(p)[threadIdx.x] = shared_floats()[blockDim.x - 1 - threadIdx.x];
}
inline void never_written(Params p) { out(p)[threadIdx.x] = shared_floats()[threadIdx.x]; }
inline void past_shared_memory(Params p) {
  shared_floats()[threadIdx.x + 1] = 1;
  out(p)[threadIdx.x] = 0;
}
inline void before_shared_memory(Params p) {
  shared_floats()[static_cast<int>(threadIdx.x) - 1] = 1;
  out(p)[threadIdx.x] = 0;
}
inline void atomic_and_plain(Params p) {
  clear();
  if (threadIdx.x < kWarp)
    atomicAdd(shared_floats(), 1.0f);
  else if (threadIdx.x == kWarp)
    shared_floats()[0] = 0;
  __syncthreads();
  out(p)[threadIdx.x] = shared_floats()[0];
}

// Warps 0 and 1 add, 2 waits for 1 only.
inline void one_of_two_adders_is_waited_for(Params p) {
  clear();
  const int warp = threadIdx.x / kWarp;
  if (warp < 2) atomicAdd(shared_floats(), 1.0f);
  if (warp > 0) named_barrier_sync(1, 2 * kWarp);
  if (warp == 2) out(p)[threadIdx.x] = shared_floats()[0];
}

// ---- mistakes with cp.async -----------------------------------------------------------------------------------------
template <int kWait>
MPLUG2_DEVICE void copy_async(Params p, int to, int other) {
  cp_async16(shared_floats() + 4 * to, in(p) + 4 * threadIdx.x);
  cp_async_commit();
  if constexpr (kWait >= 0) cp_async_wait<kWait>();
  out(p)[threadIdx.x] = shared_floats()[4 * other];
}
inline void read_in_flight(Params p) { copy_async<1>(p, threadIdx.x, threadIdx.x); }
inline void read_without_wait(Params p) { copy_async<-1>(p, threadIdx.x, threadIdx.x); }
inline void read_the_neighbours_copy(Params p) {
  clear();
  copy_async<0>(p, threadIdx.x, threadIdx.x ^ 1);
}
inline void copied_over_what_is_read(Params p) {
  clear();
  out(p)[threadIdx.x] = shared_floats()[4 * (threadIdx.x ^ kWarp)];
  cp_async16(shared_floats() + 4 * threadIdx.x, in(p) + 4 * threadIdx.x);
  cp_async_commit();
}
inline void misaligned_copy(Params p) {
  cp_async16(shared_floats() + 4 * threadIdx.x, in(p) + 4 * threadIdx.x + 2);
  cp_async_commit();
}

// ---- mistakes in global memory --------------------------------------------------------------------------------------
inline void read_past_the_end(Params p) { out(p)[threadIdx.x] = in(p)[threadIdx.x + 1]; }
inline void write_past_the_end(Params p) { out(p)[threadIdx.x + 1] = in(p)[threadIdx.x]; }
inline void write_the_input(Params p) { const_cast<float*>(in(p))[threadIdx.x] = 0; }
inline void misaligned(Params p) { *reinterpret_cast<float*>(static_cast<char*>(p.y) + 2) = 0; }
inline void two_blocks_write(Params p) { out(p)[threadIdx.x] = 1; }
inline void two_threads_write(Params p) { out(p)[threadIdx.x / 2] = 1; }
inline void read_what_another_wrote(Params p) {
  out(p)[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out(p)[0] = out(p)[blockDim.x - 1];
}
inline void write_what_another_read(Params p) {
  const float x = out(p)[threadIdx.x ^ 1];
  __syncthreads();
  out(p)[threadIdx.x] = x;
}
inline void add_without_atomics(Params p) { out(p)[0] += in(p)[threadIdx.x]; }
inline void add(Params p) { atomicAdd(out(p), in(p)[global_thread()]); }
inline void add_and_read(Params p) {
  atomicAdd(out(p), 1.0f);
  __syncthreads();
  out(p)[1 + threadIdx.x] = out(p)[0];
}
// x holds an address.
inline void follow_pointer(Params p) { out(p)[0] = **static_cast<const float* const*>(p.x); }
inline void null_pointer(Params p) { out(p)[0] = *static_cast<const volatile float*>(nullptr); }

// ---- mistakes with barriers -----------------------------------------------------------------------------------------
inline void barrier_not_reached(Params p) {
  if (threadIdx.x < kWarp) named_barrier_sync(1, 2 * kWarp);
  out(p)[threadIdx.x] = 0;
}
inline void wrong_count(Params) { named_barrier_sync(1, threadIdx.x < kWarp ? 3 * kWarp : 2 * kWarp); }
inline void arrive_twice(Params) {
  for (int i = 0; i < 2 && threadIdx.x < kWarp; ++i) named_barrier_arrive(1, 2 * kWarp);
}
inline void half_a_warp(Params) { named_barrier_sync(1, kWarp / 2); }
inline void no_such_barrier(Params) { named_barrier_sync(8, kWarp); }
inline void arrivals_left(Params) {
  if (threadIdx.x < kWarp) named_barrier_arrive(2, 2 * kWarp);
}
inline void divergent_barrier(Params p) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  out(p)[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
inline void shuffle_with_absent_lanes(Params p) {
  if (threadIdx.x < 8) out(p)[threadIdx.x] = __shfl_xor_sync(0xffu, 1.0f, 8);
}
inline void product_of_half_a_warp(Params p) {
  if (threadIdx.x >= 16) return;
  float d[4] = {};
  const uint32_t a[4] = {};
  mma_m16n8k16<bf16>(d, a, 0, 0);
  out(p)[threadIdx.x] = d[0];
}

struct Sample {
  const char* name;
  void (*kernel)(Params);
};
#define MPLUG2_SAMPLE(...) {#__VA_ARGS__, __VA_ARGS__}
const Sample kSamples[] = {
    MPLUG2_SAMPLE(shuffles),
    {"ldmatrix_x4", matrices<4, false>},
    {"ldmatrix_x4_transposed", matrices<4, true>},
    {"ldmatrix_x2", matrices<2, false>},
    {"ldmatrix_x2_transposed", matrices<2, true>},
    {"product_bf16_k16", product<bf16, 16>},
    {"product_fp16_k16", product<fp16, 16>},
    {"product_bf16_k8", product<bf16, 8>},
    {"product_fp16_k8", product<fp16, 8>},
    {"to_floats_bf16", to_floats<bf16>},
    {"to_floats_fp16", to_floats<fp16>},
    {"from_floats_bf16", from_floats<bf16>},
    {"from_floats_fp16", from_floats<fp16>},
    {"pairs_bf16", pairs<bf16>},
    {"pairs_fp16", pairs<fp16>},
    MPLUG2_SAMPLE(exponentials),
    MPLUG2_SAMPLE(warp_reductions),
    MPLUG2_SAMPLE(copy),
    MPLUG2_SAMPLE(copy16),
    MPLUG2_SAMPLE(touch_last),
    MPLUG2_SAMPLE(hand_over),
    MPLUG2_SAMPLE(tickets),
    MPLUG2_SAMPLE(table),
    MPLUG2_SAMPLE(early_return),
    MPLUG2_SAMPLE(strided),
    MPLUG2_SAMPLE(matrix_rows),
    MPLUG2_SAMPLE(products),
    MPLUG2_SAMPLE(race_between_warps),
    MPLUG2_SAMPLE(race_in_a_warp),
    MPLUG2_SAMPLE(shuffle_is_no_syncwarp),
    MPLUG2_SAMPLE(ldmatrix_of_unsynced_stores),
    MPLUG2_SAMPLE(overwritten_while_read),
    MPLUG2_SAMPLE(two_warps_write),
    MPLUG2_SAMPLE(one_named_barrier_is_not_the_other),
    MPLUG2_SAMPLE(never_written),
    MPLUG2_SAMPLE(past_shared_memory),
    MPLUG2_SAMPLE(before_shared_memory),
    MPLUG2_SAMPLE(atomic_and_plain),
    MPLUG2_SAMPLE(one_of_two_adders_is_waited_for),
    MPLUG2_SAMPLE(read_in_flight),
    MPLUG2_SAMPLE(read_without_wait),
    MPLUG2_SAMPLE(read_the_neighbours_copy),
    MPLUG2_SAMPLE(copied_over_what_is_read),
    MPLUG2_SAMPLE(misaligned_copy),
    MPLUG2_SAMPLE(read_past_the_end),
    MPLUG2_SAMPLE(write_past_the_end),
    MPLUG2_SAMPLE(write_the_input),
    MPLUG2_SAMPLE(misaligned),
    MPLUG2_SAMPLE(two_blocks_write),
    MPLUG2_SAMPLE(two_threads_write),
    MPLUG2_SAMPLE(read_what_another_wrote),
    MPLUG2_SAMPLE(write_what_another_read),
    MPLUG2_SAMPLE(add_without_atomics),
    MPLUG2_SAMPLE(add),
    MPLUG2_SAMPLE(add_and_read),
    MPLUG2_SAMPLE(follow_pointer),
    MPLUG2_SAMPLE(null_pointer),
    MPLUG2_SAMPLE(barrier_not_reached),
    MPLUG2_SAMPLE(wrong_count),
    MPLUG2_SAMPLE(arrive_twice),
    MPLUG2_SAMPLE(half_a_warp),
    MPLUG2_SAMPLE(no_such_barrier),
    MPLUG2_SAMPLE(arrivals_left),
    MPLUG2_SAMPLE(divergent_barrier),
    MPLUG2_SAMPLE(shuffle_with_absent_lanes),
    MPLUG2_SAMPLE(product_of_half_a_warp),
};

}  // namespace mplug2::samples
