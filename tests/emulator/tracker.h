// Follows what the threads of a launch do: shadow memory finds mistakes, counts add up.
#pragma once
#include <optional>

#include "counts.h"
#include "shadow.h"

namespace emulator {

class Tracker {
 public:
  // `counts` is null where nothing is counted.
  Tracker(const Block& block, const std::vector<Range>& ranges, LaunchCounts* counts);
  void begin_block() { shared.begin_block(); }

  // A load, store or atomic of a thread, anywhere.
  void access(const Thread& thread, uintptr_t address, size_t bytes, Access access, uintptr_t pc);
  void issue_copy(const Thread& thread, const Copy& copy, uintptr_t pc);
  // One matrix of ldmatrix: the addresses of its 8 rows.
  void read_matrix(const Thread& thread, const std::array<uintptr_t, 8>& rows, uintptr_t pc);
  void met(const Warp& warp);  // all lanes, or the last has returned

  SharedShadow shared;
  GlobalShadow global;
  LaunchCounts* const counts;

 private:
  uintptr_t arguments_, argument_bytes_;
  std::optional<Coalescer> coalescer_;
};

}  // namespace emulator
