#include <torch/headeronly/util/Exception.h>

#include <atomic>

#include "core/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mplug2 {
namespace {

constexpr const char* kNames[] = {"reference", "baseline", "avx2", "avx512", "amx"};

#if defined(__x86_64__)
struct Registers {
  unsigned eax, ebx, ecx, edx;
};
Registers cpuid(unsigned leaf, unsigned subleaf) {  // __builtin_cpu_supports does not know these features in gcc 12
  Registers r{};
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}
bool has_amx() { return (cpuid(7, 0).edx & (1u << 22)) && (cpuid(7, 0).edx & (1u << 24)); }  // AMX_BF16, AMX_TILE
#endif

Isa widest_isa() {
#if defined(__x86_64__)
#ifdef MPLUG2_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return has_amx() ? Isa::kAmx : Isa::kAvx512;
#endif
#ifdef MPLUG2_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
#endif
  return Isa::kBaseline;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{widest_isa()};
  return isa;
}

}  // namespace

Isa cpu_isa() { return isa_in_use().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) {
  const Isa widest = widest_isa();
  if (name.empty()) {
    isa_in_use() = widest;
    return;
  }
  for (int isa = 0; isa <= static_cast<int>(widest); ++isa) {
    if (name != kNames[isa]) continue;
    isa_in_use() = static_cast<Isa>(isa);
    return;
  }
  STD_TORCH_CHECK(false, "layer: this CPU has no layer \"", name, "\", the widest is \"", isa_name(widest), "\"");
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool found = has_amx() || (cpuid(7, 1).eax & (1u << 5));  // AVX512_BF16
  return found;
#else
  return true;  // elsewhere the product is left to whatever torch does with bfloat16
#endif
}

}  // namespace mplug2
