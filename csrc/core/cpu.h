// Which instruction set the kernels of this process use, and how a kernel table of that set is picked.
// A kernel's source is compiled once per set, in a namespace of the set's name, from a file whose suffix names it.
#pragma once
#include <string>

namespace mplug2 {

// Weakest first. kReference: no compiled kernel at all, for tests.
// kAmx: AVX-512 row kernels, and bfloat16 products in tiles.
enum class Isa { kReference, kBaseline, kAvx2, kAvx512, kAmx };

// The one in use: the widest that this CPU and this build have, unless force_isa named a weaker one.
Isa cpu_isa();

// A name of the list above in lower case; "" ends it. Of the whole process, for tests and benchmarks.
void force_isa(const std::string& name);

const char* isa_name(Isa isa);

// Without these instructions a bfloat16 product is emulated at a fifth of the speed of a float32 one (measured), so the
// kernels then multiply in float32.
bool has_bf16_products();

}  // namespace mplug2

#ifdef MPLUG2_HAVE_AVX512
#define MPLUG2_AVX512(...) avx512::__VA_ARGS__
#else
#define MPLUG2_AVX512(...) baseline::__VA_ARGS__
#endif
#ifdef MPLUG2_HAVE_AVX2
#define MPLUG2_AVX2(...) avx2::__VA_ARGS__
#else
#define MPLUG2_AVX2(...) baseline::__VA_ARGS__
#endif

// MPLUG2_KERNELS(f()): f() of the widest instruction set of this CPU. f is declared in baseline::, avx2:: and avx512::.
#define MPLUG2_KERNELS(...)                                               \
  (mplug2::cpu_isa() >= mplug2::Isa::kAvx512 ? MPLUG2_AVX512(__VA_ARGS__) \
   : mplug2::cpu_isa() == mplug2::Isa::kAvx2 ? MPLUG2_AVX2(__VA_ARGS__)   \
                                             : baseline::__VA_ARGS__)
