// State of the emulator between launches, as tests set it.
#pragma once
#include <vector>

#include "block.h"

namespace emulator {

// Global memory that kernels may touch: disjoint and sorted.
struct Range {
  uintptr_t begin, end;
  bool is_writable;
};
std::vector<Range>& allowed();

DeviceLimits& device_limits();

// Whether accesses are followed. Where they are not, blocks spread over OS threads.
struct Tracking {
  bool is_on = true;
  unsigned os_threads = 1;
};
Tracking& tracking();

// Blocks of a launch that run, by their number; the others are left out.
struct BlocksRun {
  uint64_t first = 0, end = UINT64_MAX;
};
BlocksRun& blocks_run();

}  // namespace emulator
