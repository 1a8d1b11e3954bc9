// CUDA for g++: what kernels and their host code see of the emulator. Kernels run with the threads of a block as fibers
// on the CPU; a warp's collective waits for its lanes and the last one does the work for all. Everything here is
// defined in files that are not instrumented, so that the compiler reports the accesses of kernels alone (access.cpp).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

// ---- CUDA's types ---------------------------------------------------------------------------------------------------
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace emulator {

// ---- for host code --------------------------------------------------------------------------------------------------
struct DeviceLimits {
  int num_multiprocessors;
  int max_shared_bytes;  // that a block may ask for
  int capability;        // 80, 90, ...
};
const DeviceLimits& device();

// Kernels may touch these bytes until the innermost Scope ends; overlapping ranges become one.
void allow(const void* data, size_t bytes, bool is_writable);

// An op's own global memory: empty when it begins, and the surrounding op's again when it ends.
class Scope {
 public:
  Scope();
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

void run(const char* name, dim3 grid, int threads, int shared_bytes, void (*kernel)(const void*), const void* arguments,
         size_t argument_bytes);

// Runs call() in every thread of the grid; throws std::runtime_error where the kernel is wrong.
template <class Call>
void launch(const char* name, dim3 grid, int threads, int shared_bytes, const Call& call) {
  run(name, grid, threads, shared_bytes, [](const void* c) { (*static_cast<const Call*>(c))(); }, &call, sizeof(call));
}

// ---- for kernels: what core/device.h wraps --------------------------------------------------------------------------
inline uint16_t bits(__nv_bfloat16 x) { return x.bits; }
inline uint16_t bits(__half x) { return x.bits; }
template <class T>
T from_bits(uint32_t bits) {
  return {static_cast<uint16_t>(bits)};
}

// Of the calling thread: they do not change in its life, so the compiler may ask once.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] unsigned char* shared_memory();

uint4 load16(const void* from);
void store16(void* to, uint4 value);

void cp_async16(void* to_shared, const void* from, bool is_valid);
void cp_async_commit();
void cp_async_wait(int groups);

void ldmatrix(uint32_t* r, const void* row, int count, bool is_transposed);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b);

float exp2(float x);

void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);

enum class Shuffle { kIndex, kXor, kUp, kDown };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width);

template <class T>
T shuffle_of(Shuffle kind, unsigned mask, T value, int operand, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(value));
  bits = shuffle(kind, mask, bits, operand, width);
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

unsigned ballot(unsigned mask, bool is_set);

}  // namespace emulator

// ---- CUDA's own names -----------------------------------------------------------------------------------------------
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulator::shuffle_of(emulator::Shuffle::kIndex, mask, value, lane, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulator::shuffle_of(emulator::Shuffle::kXor, mask, value, lanes, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return emulator::shuffle_of(emulator::Shuffle::kUp, mask, value, static_cast<int>(lanes), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  return emulator::shuffle_of(emulator::Shuffle::kDown, mask, value, static_cast<int>(lanes), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate == 0) == 0; }

float atomicAdd(float* to, float value);
int atomicAdd(int* to, int value);
unsigned atomicAdd(unsigned* to, unsigned value);

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const unsigned bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return __uint_as_float(sign | 0x7f800000u | magnitude);
  // Scaled by 2^112, which also gives subnormal numbers their exponent.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}
inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  unsigned magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and more
  if (magnitude < 0x38800000u)  // below 2^-14: adding 0.5 rounds to steps of 2^-24
    magnitude = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  else
    magnitude = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | magnitude)};
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return emulator::exp2(x * 1.44269504f); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
