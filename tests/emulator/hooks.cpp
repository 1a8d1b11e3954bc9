// Loads and stores of kernels, as the compiler reports them: it is asked for ThreadSanitizer's calls, which end here
// instead of in its run-time library. Host code of the same files calls them, too, and is let pass.
#include "access.h"

#define MPLUG2_HOOK extern "C" __attribute__((visibility("hidden")))

using emulator::Access;

#define MPLUG2_HOOKS(size)                                                  \
  MPLUG2_HOOK void __tsan_read##size(void* address) {                       \
    emulator::follow_aligned(address, size, Access::kRead, MPLUG2_CALLER);  \
  }                                                                         \
  MPLUG2_HOOK void __tsan_write##size(void* address) {                      \
    emulator::follow_aligned(address, size, Access::kWrite, MPLUG2_CALLER); \
  }                                                                         \
  MPLUG2_HOOK void __tsan_unaligned_read##size(void* address) {             \
    emulator::follow(address, size, Access::kRead, MPLUG2_CALLER);          \
  }                                                                         \
  MPLUG2_HOOK void __tsan_unaligned_write##size(void* address) {            \
    emulator::follow(address, size, Access::kWrite, MPLUG2_CALLER);         \
  }
MPLUG2_HOOKS(1)
MPLUG2_HOOKS(2)
MPLUG2_HOOKS(4)
MPLUG2_HOOKS(8)
MPLUG2_HOOKS(16)
MPLUG2_HOOK void __tsan_read_range(void* address, uint64_t bytes) {
  emulator::follow(address, bytes, Access::kRead, MPLUG2_CALLER);
}
MPLUG2_HOOK void __tsan_write_range(void* address, uint64_t bytes) {
  emulator::follow(address, bytes, Access::kWrite, MPLUG2_CALLER);
}
MPLUG2_HOOK void __tsan_init() {}
MPLUG2_HOOK void __tsan_vptr_update(void**, void*) {}
MPLUG2_HOOK void __tsan_vptr_read(void**) {}

// Host code's atomics, such as reference counts; kernels have CUDA's.
#define MPLUG2_ATOMIC_OPERATION(bits, name)                                                                    \
  MPLUG2_HOOK uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t* a, uint##bits##_t v, int) { \
    return __atomic_##name(a, v, __ATOMIC_SEQ_CST);                                                            \
  }
#define MPLUG2_COMPARE_EXCHANGE(bits, name)                                                                      \
  MPLUG2_HOOK int __tsan_atomic##bits##_compare_exchange_##name(volatile uint##bits##_t* a, uint##bits##_t* old, \
                                                                uint##bits##_t v, int, int) {                    \
    return __atomic_compare_exchange_n(a, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                    \
  }
#define MPLUG2_ATOMICS(bits)                                                                                     \
  MPLUG2_HOOK uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* a, int) {                 \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                              \
  MPLUG2_HOOK void __tsan_atomic##bits##_store(volatile uint##bits##_t* a, uint##bits##_t v, int) {              \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                              \
  MPLUG2_HOOK uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* a, uint##bits##_t v, int) { \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                              \
  MPLUG2_ATOMIC_OPERATION(bits, fetch_add)                                                                       \
  MPLUG2_ATOMIC_OPERATION(bits, fetch_sub)                                                                       \
  MPLUG2_ATOMIC_OPERATION(bits, fetch_and)                                                                       \
  MPLUG2_ATOMIC_OPERATION(bits, fetch_or)                                                                        \
  MPLUG2_COMPARE_EXCHANGE(bits, strong)                                                                          \
  MPLUG2_COMPARE_EXCHANGE(bits, weak)
MPLUG2_ATOMICS(8)
MPLUG2_ATOMICS(32)
MPLUG2_ATOMICS(64)
MPLUG2_HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
