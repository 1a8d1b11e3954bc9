// A GPU's own ceilings by the smallest loops that reach them, in the instructions that kernels use (core/device.h). One
// exported function a ceiling; ceilings.py compiles this file to a shared library and calls them. All take the number
// of timed launches and a place for the milliseconds of each, and return a CUDA error code.
#include <cuda_runtime.h>

#include "core/device.h"

namespace {

using namespace mplug2;

constexpr int kThreads = 256;
constexpr int kChains = 8;  // independent chains of a thread, more than the latency of any instruction here needs

// DRAM: n 16-byte words from one buffer to another, four of a thread in flight.
__global__ void copy_kernel(const uint4* from, uint4* to, size_t n) {
  const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
  size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 words[4];
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) words[j] = load16_once(from + i + j * step);
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) store16_once(to + i + j * step, words[j]);
  }
  for (; i < n; i += step) store16_once(to + i, load16_once(from + i));
}

// L2: every block reads all n 16-byte words `rounds` times, past the first-level cache, each from its own place on.
__global__ void l2_kernel(const uint4* from, uint32_t* sink, int n, int rounds) {
  uint32_t seen = 0;
  int at = static_cast<int>((blockIdx.x * 977u * kThreads + threadIdx.x) % n);
  for (int i = 0; i < rounds * (n / kThreads); i += 4) {
    uint4 words[4];
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) {
      words[j] = __ldcg(from + at);
      at += kThreads;
      if (at >= n) at -= n;
    }
    MPLUG2_UNROLL
    for (int j = 0; j < 4; ++j) seen ^= words[j].x ^ words[j].y ^ words[j].z ^ words[j].w;
  }
  if (seen == 0x9e3779b9) *sink = seen;
}

// Shared memory by ldmatrix: a warp reads 512 bytes an instruction, every bank once in each of its four passes. The
// place moves with the round, or the compiler would load once.
__global__ void ldmatrix_kernel(uint32_t* sink, int rounds) {
  unsigned char* shared = shared_memory();
  for (int i = threadIdx.x; i < kChains * 512 / 4; i += kThreads) reinterpret_cast<uint32_t*>(shared)[i] = i;
  __syncthreads();
  uint32_t seen = 0;
  int at = threadIdx.x % kWarp * 16;
  for (int i = 0; i < rounds; ++i) {
    uint32_t words[kChains][4];
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain) ldmatrix_x4(words[chain], shared + (at ^ (chain * 512)));
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain)
      seen ^= words[chain][0] ^ words[chain][1] ^ words[chain][2] ^ words[chain][3];
    at ^= 512 * (i & (kChains - 1));
  }
  if (seen == 0x9e3779b9) *sink = seen;
}

// The same by 16-byte loads.
__global__ void load16_kernel(uint32_t* sink, int rounds) {
  unsigned char* shared = shared_memory();
  for (int i = threadIdx.x; i < kChains * 512 / 4; i += kThreads) reinterpret_cast<uint32_t*>(shared)[i] = i;
  __syncthreads();
  uint32_t seen = 0;
  int at = threadIdx.x % kWarp * 16;
  for (int i = 0; i < rounds; ++i) {
    uint4 words[kChains];
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain) words[chain] = load16(shared + (at ^ (chain * 512)));
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain)
      seen ^= words[chain].x ^ words[chain].y ^ words[chain].z ^ words[chain].w;
    at ^= 512 * (i & (kChains - 1));
  }
  if (seen == 0x9e3779b9) *sink = seen;
}

// mma.sync m16n8k16 in bfloat16 on registers alone.
__global__ void mma_kernel(uint32_t* sink, int rounds) {
  // Numbers near 1 of both signs: products of zeros would draw less power, and run faster, than a kernel's.
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u ^ ((threadIdx.x * 2654435761u + i * 40503u) & 0x807f807fu);
  for (int i = 0; i < 2; ++i) b[i] = 0x3f803f80u ^ ((threadIdx.x * 2246822519u + i * 60493u) & 0x807f807fu);
  float d[kChains][4] = {};
  for (int i = 0; i < rounds; ++i) {
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain) mma_m16n8k16<bf16>(d[chain], a, b[0], b[1]);
  }
  float seen = 0;
  for (int chain = 0; chain < kChains; ++chain)
    for (int j = 0; j < 4; ++j) seen += d[chain][j];
  if (seen == 1.2345f) *sink = 1;
}

// exp2: the sign keeps every chain finite.
__global__ void exp2_kernel(uint32_t* sink, int rounds) {
  float x[kChains];
  for (int chain = 0; chain < kChains; ++chain) x[chain] = 0.1f * static_cast<float>(chain + threadIdx.x % kWarp);
  for (int i = 0; i < rounds; ++i) {
    MPLUG2_UNROLL
    for (int chain = 0; chain < kChains; ++chain) x[chain] = exp2_approx(-x[chain]);
  }
  float seen = 0;
  for (int chain = 0; chain < kChains; ++chain) seen += x[chain];
  if (seen == 1.2345f) *sink = 1;
}

// Launches `call` once to warm up, then `launches` times between events.
template <class Call>
int timed(int launches, float* milliseconds, const Call& call) {
  cudaEvent_t begin, end;
  if (const cudaError_t error = cudaEventCreate(&begin)) return error;
  if (const cudaError_t error = cudaEventCreate(&end)) return error;
  call();
  for (int i = 0; i < launches; ++i) {
    cudaEventRecord(begin);
    call();
    cudaEventRecord(end);
    if (const cudaError_t error = cudaEventSynchronize(end)) return error;
    if (const cudaError_t error = cudaEventElapsedTime(&milliseconds[i], begin, end)) return error;
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return cudaGetLastError();
}

int blocks(int a_multiprocessor) {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return a_multiprocessor * count;
}

// A sink, and `bytes` of something else than zeros behind each of `count` pointers.
struct Buffers {
  explicit Buffers(size_t bytes, int count = 1) {
    error = cudaMalloc(&sink, 4);
    for (int i = 0; i < count && error == cudaSuccess; ++i) {
      error = cudaMalloc(&data[i], bytes);
      if (error == cudaSuccess) error = cudaMemset(data[i], 0x3c + i, bytes);
    }
  }
  ~Buffers() {
    cudaFree(sink);
    for (uint4* buffer : data) cudaFree(buffer);
  }
  cudaError_t error = cudaSuccess;
  uint32_t* sink = nullptr;
  uint4* data[2] = {};
};

constexpr int kResident = 4;  // blocks of kThreads that a multiprocessor runs at once
constexpr int kSharedBytes = kChains * 512;

}  // namespace

extern "C" {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int device_facts(char* name, int size, int* multiprocessors, int* l2_bytes, int* capability) {
  cudaDeviceProp properties;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  for (int i = 0; i < size; ++i) name[i] = i + 1 < size ? properties.name[i] : '\0';
  *multiprocessors = properties.multiProcessorCount;
  *l2_bytes = properties.l2CacheSize;
  *capability = 10 * properties.major + properties.minor;
  return cudaSuccess;
}

// `work` is how much one launch does: bytes (copy: read and written), matrix instructions, exponentials.
int measure_copy(int launches, float* milliseconds, double* work) {
  constexpr size_t kBytes = size_t{1} << 30;
  const Buffers buffers(kBytes, 2);
  if (buffers.error) return buffers.error;
  *work = 2.0 * kBytes;
  return timed(launches, milliseconds,
               [&] { copy_kernel<<<blocks(8), kThreads>>>(buffers.data[0], buffers.data[1], kBytes / 16); });
}

int measure_l2_read(int launches, float* milliseconds, double* work) {
  constexpr int kBytes = 16 << 20, kRounds = 4;
  const Buffers buffers(kBytes);
  if (buffers.error) return buffers.error;
  *work = static_cast<double>(kBytes) * kRounds * blocks(kResident);
  return timed(launches, milliseconds, [&] {
    l2_kernel<<<blocks(kResident), kThreads>>>(buffers.data[0], buffers.sink, kBytes / 16, kRounds);
  });
}

int measure_shared_ldmatrix(int launches, float* milliseconds, double* work) {
  constexpr int kRounds = 4096;
  const Buffers buffers(16);
  if (buffers.error) return buffers.error;
  *work = 16.0 * kChains * kRounds * kThreads * blocks(kResident);
  return timed(launches, milliseconds,
               [&] { ldmatrix_kernel<<<blocks(kResident), kThreads, kSharedBytes>>>(buffers.sink, kRounds); });
}

int measure_shared_load16(int launches, float* milliseconds, double* work) {
  constexpr int kRounds = 4096;
  const Buffers buffers(16);
  if (buffers.error) return buffers.error;
  *work = 16.0 * kChains * kRounds * kThreads * blocks(kResident);
  return timed(launches, milliseconds,
               [&] { load16_kernel<<<blocks(kResident), kThreads, kSharedBytes>>>(buffers.sink, kRounds); });
}

int measure_mma(int launches, float* milliseconds, double* work) {
  constexpr int kRounds = 8192;
  const Buffers buffers(16);
  if (buffers.error) return buffers.error;
  *work = static_cast<double>(kChains) * kRounds * (kThreads / kWarp) * blocks(kResident);
  return timed(launches, milliseconds, [&] { mma_kernel<<<blocks(kResident), kThreads>>>(buffers.sink, kRounds); });
}

int measure_exp2(int launches, float* milliseconds, double* work) {
  constexpr int kRounds = 16384;
  const Buffers buffers(16);
  if (buffers.error) return buffers.error;
  *work = static_cast<double>(kChains) * kRounds * kThreads * blocks(kResident);
  return timed(launches, milliseconds, [&] { exp2_kernel<<<blocks(kResident), kThreads>>>(buffers.sink, kRounds); });
}
}
