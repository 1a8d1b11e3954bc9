#include "shadow.h"

#include <algorithm>
#include <new>

namespace emulator {
namespace {

// ---- entries: when and by whom; 0 is never ------------------------------------------------------------------------
// Beside 32 lanes: all of them at once, a copy that has not landed, atomics, more than one lane.
constexpr int kAllLanes = 32, kInFlight = 33, kAtomically = 34, kManyLanes = 35;

constexpr uint32_t entry(uint32_t clock, int warp, int lane) {
  return clock << 11 | static_cast<uint32_t>(warp) << 6 | static_cast<uint32_t>(lane);
}
constexpr uint32_t clock_of(uint32_t e) { return e >> 11; }
constexpr int warp_of(uint32_t e) { return static_cast<int>(e >> 6 & 31); }
constexpr int lane_of(uint32_t e) { return static_cast<int>(e & 63); }
constexpr uint32_t kLastClock = (1u << 21) - 1;

std::string hex(uintptr_t address) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  do text.insert(text.begin(), kDigits[address % 16]);
  while ((address /= 16) != 0);
  return "0x" + text;
}

std::string actor(uint32_t e) {
  const std::string warp = std::to_string(warp_of(e));
  const int lane = lane_of(e);
  if (lane < kLanes)
    return "thread " + std::to_string(warp_of(e) * kLanes + lane) + " (warp " + warp + ", lane " +
           std::to_string(lane) + ")";
  if (lane == kAllLanes) return "ldmatrix of warp " + warp;
  if (lane == kAtomically) return "an atomic of warp " + warp;
  if (lane == kManyLanes) return "several lanes of warp " + warp;
  return "cp.async of warp " + warp;
}

}  // namespace

// ---- shared memory --------------------------------------------------------------------------------------------------
SharedShadow::SharedShadow(size_t bytes, int warps)
    : cells_((bytes + 1) / 2), warps_(warps), writes_(cells_), reads_(cells_ * static_cast<size_t>(warps)) {}

void SharedShadow::begin_block() {
  std::fill(writes_.begin(), writes_.end(), 0);
  std::fill(reads_.begin(), reads_.end(), 0);
  for (Clocks& clocks : clocks_) clocks.fill(0);
  for (int warp = 0; warp < warps_; ++warp) clocks_[warp][warp] = 1;
}

void SharedShadow::sync_warp(int warp) {
  if (++clocks_[warp][warp] == kLastClock) fail("the emulator follows at most 2,097,151 barriers of a warp");
}
void SharedShadow::arrive(int warp, Clocks& barrier) {
  for (int other = 0; other < warps_; ++other) barrier[other] = std::max(barrier[other], clocks_[warp][other]);
  sync_warp(warp);
}
void SharedShadow::depart(int warp, const Clocks& barrier) {
  for (int other = 0; other < warps_; ++other)
    if (other != warp) clocks_[warp][other] = std::max(clocks_[warp][other], barrier[other]);
}

// An error unless what `earlier` says happened before an access of `lane` now.
void SharedShadow::check_before(const Thread& thread, uint32_t earlier, int lane, bool is_write, const char* did,
                                size_t cell, uintptr_t pc) const {
  if (earlier == 0) return;
  const int warp = thread.warp->index, other = warp_of(earlier), other_lane = lane_of(earlier);
  const bool is_in_flight = other_lane == kInFlight;
  const bool is_ordered =
      other != warp ? clock_of(earlier) <= clocks_[warp][other]
                    : clock_of(earlier) < clocks_[warp][warp] || other_lane == lane || other_lane == kAllLanes;
  if (is_ordered && !is_in_flight) return;
  const std::string where =
      std::string(is_write ? "writes" : "reads") + " byte " + std::to_string(2 * cell) + " of shared memory, ";
  const std::string warps = std::to_string(other) + " and " + std::to_string(warp);
  if (is_in_flight)
    fail(where + "where a cp.async of warp " + std::to_string(other) + " is in flight: no cp_async_wait for it yet",
         pc);
  const std::string race = "race: " + where + "which " + actor(earlier) + " " + did + ": no ";
  if (other != warp) fail(race + "barrier between warps " + warps + " since", pc);
  fail(race + "__syncwarp of the whole warp since (shuffles, votes and ldmatrix order no memory)", pc);
}

void SharedShadow::read(const Thread& thread, size_t offset, size_t bytes, int lane, uintptr_t pc) {
  const int warp = thread.warp->index;
  const uint32_t mine = entry(clocks_[warp][warp], warp, lane);
  uint32_t* const reads = &reads_[static_cast<size_t>(warp) * cells_];
  uint32_t checked = 0;
  for (size_t cell = offset / 2; cell <= (offset + bytes - 1) / 2; ++cell) {
    const uint32_t written = writes_[cell];
    if (written != checked || written == 0) {
      if (written == 0) fail("reads byte " + std::to_string(2 * cell) + " of shared memory, which nobody wrote", pc);
      if (!(lane == kAtomically && lane_of(written) == kAtomically))
        check_before(thread, written, lane, false, "wrote", cell, pc);
      checked = written;
      if (lane_of(written) == kAtomically && lane != kAtomically)  // the last write is not the only one that counts
        for (int other = 0; other < warps_; ++other)
          if (const uint32_t added = reads_[static_cast<size_t>(other) * cells_ + cell]; lane_of(added) == kAtomically)
            check_before(thread, added, lane, false, "wrote", cell, pc);
    }
    uint32_t& last = reads[cell];
    if (last == mine) continue;
    if (clock_of(last) != clock_of(mine) || lane_of(last) == kAllLanes)
      last = mine;
    else if (lane != kAllLanes)
      last = entry(clock_of(mine), warp, kManyLanes);
  }
}

void SharedShadow::write(const Thread& thread, size_t offset, size_t bytes, int lane, uintptr_t pc) {
  const int warp = thread.warp->index;
  const int as_lane = lane == kInFlight ? thread.lane : lane;
  const size_t first = offset / 2, last = (offset + bytes - 1) / 2;
  uint32_t checked = 0;
  for (size_t cell = first; cell <= last; ++cell) {
    const uint32_t written = writes_[cell];
    if (written == checked) continue;
    if (!(lane == kAtomically && lane_of(written) == kAtomically))
      check_before(thread, written, as_lane, true, "wrote", cell, pc);
    checked = written;
  }
  for (int other = 0; other < warps_; ++other) {
    const uint32_t* const reads = &reads_[static_cast<size_t>(other) * cells_];
    checked = 0;
    for (size_t cell = first; cell <= last; ++cell) {
      if (reads[cell] == checked) continue;
      checked = reads[cell];
      if (!(lane == kAtomically && lane_of(checked) == kAtomically))
        check_before(thread, checked, as_lane, true, "read", cell, pc);
    }
  }
  std::fill(writes_.begin() + static_cast<ptrdiff_t>(first), writes_.begin() + static_cast<ptrdiff_t>(last) + 1,
            entry(clocks_[warp][warp], warp, lane));
}

void SharedShadow::access(const Thread& thread, size_t offset, size_t bytes, Access access, uintptr_t pc) {
  const int lane = access == Access::kAtomic ? kAtomically : thread.lane;
  if (access != Access::kWrite) read(thread, offset, bytes, lane, pc);
  if (access != Access::kRead) write(thread, offset, bytes, lane, pc);
}
void SharedShadow::read_row(const Thread& thread, size_t offset, uintptr_t pc) {
  read(thread, offset, 16, kAllLanes, pc);
}
void SharedShadow::issue(const Thread& thread, size_t offset, uintptr_t pc) {
  write(thread, offset, 16, kInFlight, pc);
}
void SharedShadow::land(const Thread& thread, size_t offset) {
  const int warp = thread.warp->index;
  std::fill_n(writes_.begin() + static_cast<ptrdiff_t>(offset / 2), 8, entry(clocks_[warp][warp], warp, thread.lane));
}

// ---- global memory --------------------------------------------------------------------------------------------------
namespace {
constexpr uint32_t kAtomicThreads = 0xffffffffu, kManyThreads = 0xfffffffeu;

std::string actor(const Thread& thread, uint32_t launch_thread) {
  if (launch_thread == kAtomicThreads) return "atomics";
  if (launch_thread == kManyThreads) return "several threads";
  const uint32_t threads = thread.block->size.x, number = launch_thread - 1;
  return "thread " + std::to_string(number % threads) + " of block " + std::to_string(number / threads) + " (in order)";
}
}  // namespace

GlobalShadow::GlobalShadow(const std::vector<Range>& ranges, LaunchCounts* counts) {
  if (counts != nullptr) counts->ranges.resize(ranges.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    const Range& range = ranges[i];
    const size_t bytes = range.end - range.begin;
    regions_.push_back({range, SparseArray<Cell>(range.is_writable ? bytes / 2 + 2 : 0),
                        SparseArray<Sector>(counts != nullptr ? bytes / kSectorBytes + 2 : 0),
                        counts != nullptr ? &counts->ranges[i] : nullptr});
    if (counts != nullptr) {
      counts->ranges[i].data = range.begin;
      counts->ranges[i].bytes = bytes;
    }
  }
}

GlobalShadow::Region& GlobalShadow::region(const Thread& thread, uintptr_t address, size_t bytes, Access access,
                                           uintptr_t pc) {
  const auto holds = [&](const Region& r) { return address >= r.range.begin && address + bytes <= r.range.end; };
  if (last_ < regions_.size() && holds(regions_[last_])) return regions_[last_];
  const auto after = std::upper_bound(regions_.begin(), regions_.end(), address,
                                      [](uintptr_t a, const Region& r) { return a < r.range.begin; });
  if (after != regions_.begin() && holds(*(after - 1))) {
    last_ = static_cast<size_t>(after - 1 - regions_.begin());
    return regions_[last_];
  }
  std::string what = std::string(access == Access::kRead ? "reads " : "writes ") + std::to_string(bytes) +
                     " bytes outside of every tensor of the op";
  // The nearest tensor, if one is near.
  constexpr uintptr_t kNear = 1 << 20;
  if (after != regions_.begin() &&
      address - (after - 1)->range.begin < kNear + ((after - 1)->range.end - (after - 1)->range.begin)) {
    const Range& range = (after - 1)->range;
    what += ", at byte " + std::to_string(address - range.begin) + " of one of " +
            std::to_string(range.end - range.begin) + " bytes";
  } else if (after != regions_.end() && after->range.begin - address < kNear) {
    what += ", " + std::to_string(after->range.begin - address) + " bytes before one";
  } else if (thread.block->shared != nullptr) {
    what += ", at " + hex(address);
  }
  fail(what, pc);
}

void GlobalShadow::access(const Thread& thread, uintptr_t address, size_t bytes, Access access, uintptr_t pc) {
  Region& r = region(thread, address, bytes, access, pc);
  const bool reads = access != Access::kWrite, writes = access != Access::kRead;
  const auto where = [&] {
    return " byte " + std::to_string(address - r.range.begin) + " of a tensor of " +
           std::to_string(r.range.end - r.range.begin) + " bytes";
  };
  if (writes && !r.range.is_writable) fail("writes" + where() + " that the op only reads", pc);
  if (!r.cells.is_empty()) {
    const uint32_t me = static_cast<uint32_t>(thread.block->number * thread.block->size.x + thread.index.x + 1);
    const uint32_t as = access == Access::kAtomic ? kAtomicThreads : me;
    const size_t offset = address - r.range.begin;
    for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
      Cell& cell = r.cells[i];
      if (cell.writer != 0 && cell.writer != as)
        fail(std::string(writes ? "writes" : "reads") + where() + " that " + actor(thread, cell.writer) +
                 " wrote in the same launch" + (access == Access::kAtomic ? "" : ", without atomics"),
             pc);
      if (access == Access::kAtomic) {
        if (cell.reader != 0)
          fail("adds to" + where() + " that " + actor(thread, cell.reader) + " read in the same launch", pc);
        cell.writer = as;
        continue;
      }
      if (writes) {
        if (cell.reader != 0 && cell.reader != me)
          fail("writes" + where() + " that " + actor(thread, cell.reader) + " read in the same launch", pc);
        cell.writer = me;
      } else {
        cell.reader = cell.reader == 0 || cell.reader == me ? me : kManyThreads;
      }
    }
  }
  if (r.sectors.is_empty()) return;
  const uint32_t block = static_cast<uint32_t>(thread.block->number + 1);
  // Sectors lie at multiples of 32 bytes of the address.
  const uintptr_t origin = r.range.begin / kSectorBytes;
  for (uintptr_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s) {
    Sector& sector = r.sectors[s - origin];
    const auto note = [block](uint32_t& last, Sectors& sectors) {
      sectors.launch += last == 0;
      sectors.blocks += last != block;
      last = block;
    };
    if (reads) note(sector.read, r.counts->read);
    if (writes) note(sector.written, r.counts->written);
  }
}

}  // namespace emulator
