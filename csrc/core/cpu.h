// Which instruction set the kernels of this process use, and how a kernel table of that set is picked.
// A kernel's source is compiled once per set, in a namespace of the set's name, from a file whose suffix names it.
#pragma once

namespace mplug2 {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa cpu_isa() {
  static const Isa isa = [] {
#if defined(__x86_64__)
#ifdef MPLUG2_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::kAvx512;
#endif
#ifdef MPLUG2_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      return Isa::kAvx2;
#endif
#endif
    return Isa::kBaseline;
  }();
  return isa;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "baseline";
}

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
#define MPLUG2_KERNELS(...)                                                 \
  (mplug2::cpu_isa() == mplug2::Isa::kAvx512 ? MPLUG2_AVX512(__VA_ARGS__)   \
   : mplug2::cpu_isa() == mplug2::Isa::kAvx2 ? MPLUG2_AVX2(__VA_ARGS__)     \
                                             : baseline::__VA_ARGS__)
