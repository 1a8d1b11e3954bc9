// What kernels are written in: types, machine instructions and CUDA's intrinsics. Every instruction is one thin
// function with two halves: under nvcc CUTLASS's one-instruction struct, under g++ the emulator (tests/emulator).
// Shuffles, votes, atomics, __syncthreads and __syncwarp are CUDA's own names in both. Kernels take POD parameters and
// no torch header, and reach shared memory by shared_memory() only: static __shared__ does not exist here.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#define MPLUG2_DEVICE __device__ __forceinline__
#define MPLUG2_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define MPLUG2_UNROLL _Pragma("unroll")

#else

#include "emulator.h"

// Always, so that the emulator can tell instructions by their place in the code.
#define MPLUG2_DEVICE inline __attribute__((always_inline))
#define MPLUG2_KERNEL(max_threads, min_blocks) void
#define MPLUG2_UNROLL

#endif

namespace mplug2 {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;

// ---- numbers --------------------------------------------------------------------------------------------------------
MPLUG2_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MPLUG2_DEVICE float to_float(fp16 x) { return __half2float(x); }
MPLUG2_DEVICE float to_float(float x) { return x; }
// Rounded to nearest even.
template <class T>
MPLUG2_DEVICE T from_float(float x);
template <>
MPLUG2_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
MPLUG2_DEVICE fp16 from_float<fp16>(float x) {
  return __float2half_rn(x);
}
template <>
MPLUG2_DEVICE float from_float<float>(float x) {
  return x;
}

// Two numbers of 16 bits in a register, the first in the low half, as mma.sync and 16-byte accesses hold them.
template <class T>
MPLUG2_DEVICE uint32_t pack(float low, float high);
template <class T>
MPLUG2_DEVICE float2 unpack(uint32_t pair);
#if defined(__CUDACC__)
template <>
MPLUG2_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
MPLUG2_DEVICE uint32_t pack<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
MPLUG2_DEVICE float2 unpack<bf16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
MPLUG2_DEVICE float2 unpack<fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
#else
template <class T>
uint32_t pack(float low, float high) {
  return emulator::bits(from_float<T>(low)) | static_cast<uint32_t>(emulator::bits(from_float<T>(high))) << 16;
}
template <class T>
float2 unpack(uint32_t pair) {
  return {to_float(emulator::from_bits<T>(pair & 0xffff)), to_float(emulator::from_bits<T>(pair >> 16))};
}
#endif

// 2^x, one instruction; 0 for -infinity. Relative error 2^-22, results below 2^-126 are 0.
MPLUG2_DEVICE float exp2_approx(float x) {
#if defined(__CUDACC__)
  // CUTLASS has no struct for it. Own PTX: this line and no other.
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return emulator::exp2(x);
#endif
}

// ---- memory ---------------------------------------------------------------------------------------------------------
// The block's shared memory, whose size the launch gives; aligned to 128 bytes.
MPLUG2_DEVICE unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char mplug2_shared[];
  return mplug2_shared;
#else
  return emulator::shared_memory();
#endif
}

// 16 bytes in one access, from or to global or shared memory; aligned to 16 bytes.
MPLUG2_DEVICE uint4 load16(const void* from) {
#if defined(__CUDACC__)
  return *static_cast<const uint4*>(from);
#else
  return emulator::load16(from);
#endif
}
MPLUG2_DEVICE void store16(void* to, uint4 value) {
#if defined(__CUDACC__)
  // As one number: nvcc takes the store of a struct apart, and does not always put it together again.
  unsigned __int128 bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  *static_cast<unsigned __int128*>(to) = bits;
#else
  emulator::store16(to, value);
#endif
}
// 8 bytes in one access, aligned to 8.
MPLUG2_DEVICE void store8(void* to, uint2 value) {
#if defined(__CUDACC__)
  *static_cast<uint2*>(to) = value;
#else
  __builtin_memcpy(__builtin_assume_aligned(to, sizeof(value)), &value, sizeof(value));
#endif
}
// 16 bytes of global memory that nobody reads or writes again soon: they leave the caches first.
MPLUG2_DEVICE uint4 load16_once(const void* from) {
#if defined(__CUDACC__)
  return __ldcs(static_cast<const uint4*>(from));
#else
  return emulator::load16(from);
#endif
}
MPLUG2_DEVICE void store16_once(void* to, uint4 value) {
#if defined(__CUDACC__)
  __stcs(static_cast<uint4*>(to), value);
#else
  emulator::store16(to, value);
#endif
}

// ---- cp.async: 16 bytes from global to shared memory, in flight until waited for ------------------------------------
// Zeros where !is_valid; `from` is then not read, but must be a legal address.
MPLUG2_DEVICE void cp_async16(void* to_shared, const void* from, bool is_valid = true) {
#if defined(__CUDACC__)
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*static_cast<const cute::uint128_t*>(from),
                                                               *static_cast<cute::uint128_t*>(to_shared), is_valid);
  asm volatile("" ::: "memory");  // CUTLASS's struct does not tell the compiler that memory changes
#else
  emulator::cp_async16(to_shared, from, is_valid);
#endif
}
// Ends this thread's group of copies.
MPLUG2_DEVICE void cp_async_commit() {
#if defined(__CUDACC__)
  cute::cp_async_fence();
  asm volatile("" ::: "memory");
#else
  emulator::cp_async_commit();
#endif
}
// Until all but the last kGroups groups of this thread have landed. Other threads see them after a barrier.
template <int kGroups>
MPLUG2_DEVICE void cp_async_wait() {
#if defined(__CUDACC__)
  cute::cp_async_wait<kGroups>();
  asm volatile("" ::: "memory");
#else
  emulator::cp_async_wait(kGroups);
#endif
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit numbers from shared memory --------------------------------------------------
// Lane l gives the address of row l % 8 of matrix l / 8 (x2: of lanes 0 to 15); 16 bytes a row, aligned to 16. Lane l
// gets elements (l / 4, l % 4 * 2) and its right neighbour of each matrix; transposed: ((l % 4) * 2, l / 4) and the one
// below.
MPLUG2_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  cute::SM75_U32x4_LDSM_N::copy(*static_cast<const cute::uint128_t*>(row), r[0], r[1], r[2], r[3]);
  asm volatile("" ::: "memory");
#else
  emulator::ldmatrix(r, row, 4, false);
#endif
}
MPLUG2_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  cute::SM75_U32x2_LDSM_N::copy(*static_cast<const cute::uint128_t*>(row), r[0], r[1]);
  asm volatile("" ::: "memory");
#else
  emulator::ldmatrix(r, row, 2, false);
#endif
}
MPLUG2_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDACC__)
  cute::SM75_U16x8_LDSM_T::copy(*static_cast<const cute::uint128_t*>(row), r[0], r[1], r[2], r[3]);
  asm volatile("" ::: "memory");
#else
  emulator::ldmatrix(r, row, 4, true);
#endif
}
MPLUG2_DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* row) {
#if defined(__CUDACC__)
  cute::SM75_U16x4_LDSM_T::copy(*static_cast<const cute::uint128_t*>(row), r[0], r[1]);
  asm volatile("" ::: "memory");
#else
  emulator::ldmatrix(r, row, 2, true);
#endif
}

// ---- mma.sync: d += a b for one warp, float32 sums ------------------------------------------------------------------
// With g = lane / 4 and t = lane % 4: a (16 x 16, rows g and g + 8, columns 2t, 2t + 1 and 8 more) in the order
// (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b (16 x 8) holds (2t, g), (2t + 8, g); d (16 x 8) holds (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
MPLUG2_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDACC__)
  using Instruction = std::conditional_t<std::is_same_v<T, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                         cute::SM80_16x8x16_F32F16F16F32_TN>;
  Instruction::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
#else
  emulator::mma_m16n8k16<T>(d, a, b0, b1);
#endif
}
// The same over 8 columns of a and rows of b: a holds (g, 2t), (g + 8, 2t); b (2t, g).
template <class T>
MPLUG2_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if defined(__CUDACC__)
  using Instruction = std::conditional_t<std::is_same_v<T, bf16>, cute::SM80_16x8x8_F32BF16BF16F32_TN,
                                         cute::SM80_16x8x8_F32F16F16F32_TN>;
  Instruction::fma(d[0], d[1], d[2], d[3], a[0], a[1], b, d[0], d[1], d[2], d[3]);
#else
  emulator::mma_m16n8k8<T>(d, a, b);
#endif
}

// ---- named barriers: `threads` threads, whole warps, of the block; id 0 to 7 ----------------------------------------
// The hardware's ids 0 to 7 are left to CUTLASS and __syncthreads. CUTLASS's struct is a breakpoint before sm_90. Own
// PTX: these two lines.
MPLUG2_DEVICE void named_barrier_sync(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id + 8), "r"(threads) : "memory");
#else
  emulator::named_barrier_sync(id, threads);
#endif
}
// Counted, without waiting.
MPLUG2_DEVICE void named_barrier_arrive(int id, int threads) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id + 8), "r"(threads) : "memory");
#else
  emulator::named_barrier_arrive(id, threads);
#endif
}

// ---- warp reductions, every lane gets the result --------------------------------------------------------------------
MPLUG2_DEVICE float warp_sum(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}
MPLUG2_DEVICE float warp_max(float x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

}  // namespace mplug2
