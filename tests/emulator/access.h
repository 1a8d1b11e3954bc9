// How an access of a kernel reaches the tracker, from the compiler's calls and from the emulator's own functions.
#pragma once
#include "tracker.h"

#define MPLUG2_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

namespace emulator {

// Not the fiber's own stack, which stands for registers.
inline bool is_followed(const Thread* thread, const void* address) {
  return thread != nullptr && thread->tracker != nullptr &&
         reinterpret_cast<uintptr_t>(address) - thread->stack >= kStackBytes;
}

void follow_far(const void* address, size_t bytes, Access access, bool is_aligned, uintptr_t pc);

inline void follow(const void* address, size_t bytes, Access access, uintptr_t pc) {
  if (is_followed(current, address)) follow_far(address, bytes, access, /*is_aligned=*/false, pc);
}

// A GPU wants every access at a multiple of its size.
inline void follow_aligned(const void* address, size_t bytes, Access access, uintptr_t pc) {
  if (is_followed(current, address)) follow_far(address, bytes, access, /*is_aligned=*/true, pc);
}

}  // namespace emulator
