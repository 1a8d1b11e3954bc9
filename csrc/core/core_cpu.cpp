#include "core/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mplug2 {

bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool found = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__builtin_cpu_supports("avx512f")) return false;
    const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & (1u << 22)) && (edx & (1u << 24));
    const bool avx512_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
    return amx || avx512_bf16;
  }();
  return found;
#else
  return true;  // elsewhere the product is left to whatever torch does with bfloat16
#endif
}

}  // namespace mplug2
