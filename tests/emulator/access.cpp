// Accesses that are functions of the emulator: 16 bytes at once, and atomics.
#include "access.h"

namespace emulator {

void follow_far(const void* address, size_t bytes, Access access, bool is_aligned, uintptr_t pc) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (is_aligned && at % bytes != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes", pc);
  current->tracker->access(*current, at, bytes, access, pc);
}

uint4 load16(const void* from) {
  follow_aligned(from, 16, Access::kRead, MPLUG2_CALLER);
  return *static_cast<const uint4*>(from);
}
void store16(void* to, uint4 value) {
  follow_aligned(to, 16, Access::kWrite, MPLUG2_CALLER);
  *static_cast<uint4*>(to) = value;
}

}  // namespace emulator

float atomicAdd(float* to, float value) {
  emulator::follow_aligned(to, 4, emulator::Access::kAtomic, MPLUG2_CALLER);
  float old, sum;
  __atomic_load(to, &old, __ATOMIC_RELAXED);
  do sum = old + value;
  while (!__atomic_compare_exchange(to, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
int atomicAdd(int* to, int value) {
  emulator::follow_aligned(to, 4, emulator::Access::kAtomic, MPLUG2_CALLER);
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
unsigned atomicAdd(unsigned* to, unsigned value) {
  emulator::follow_aligned(to, 4, emulator::Access::kAtomic, MPLUG2_CALLER);
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
