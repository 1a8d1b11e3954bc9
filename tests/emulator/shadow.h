// Shadow memory: who touched which bytes and when, to find what the values alone do not show: races between warps and
// between lanes of a warp, reads of memory nobody wrote, bytes that two threads of a launch share.
//
// Time is a vector clock for each warp (as FastTrack keeps it for each thread): a warp's own clock ticks at __syncwarp
// and at barriers, and a barrier brings the clocks of the warps that arrived to those that waited. Shuffles, votes and
// matrix instructions order no memory, as CUDA has it.
#pragma once
#include <sys/mman.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "block.h"
#include "counts.h"
#include "launch.h"

namespace emulator {

enum class Access { kRead, kWrite, kAtomic };

// Zeroed memory that takes pages only where it is written.
template <class T>
class SparseArray {
 public:
  explicit SparseArray(size_t size) : bytes_(size * sizeof(T)) {
    if (bytes_ == 0) return;
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(data);
  }
  SparseArray(SparseArray&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  ~SparseArray() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  T& operator[](size_t i) { return data_[i]; }
  bool is_empty() const { return data_ == nullptr; }

 private:
  T* data_ = nullptr;
  size_t bytes_;
};

// The block's shared memory, followed in pairs of bytes: single bytes count as their pair.
class SharedShadow {
 public:
  SharedShadow(size_t bytes, int warps);
  // Nothing is written, every warp's clock is 1.
  void begin_block();

  // By a thread.
  void access(const Thread& thread, size_t offset, size_t bytes, Access access, uintptr_t pc);
  // 16 bytes by ldmatrix, which is all lanes' read.
  void read_row(const Thread& thread, size_t offset, uintptr_t pc);
  // 16 bytes by cp.async: a write from its issue on, which nobody may look at until it has landed.
  void issue(const Thread& thread, size_t offset, uintptr_t pc);
  void land(const Thread& thread, size_t offset);

  void sync_warp(int warp);
  void arrive(int warp, Clocks& barrier);
  void depart(int warp, const Clocks& barrier);

 private:
  void check_before(const Thread& thread, uint32_t earlier, int lane, bool is_write, const char* did, size_t cell,
                    uintptr_t pc) const;
  void read(const Thread& thread, size_t offset, size_t bytes, int lane, uintptr_t pc);
  void write(const Thread& thread, size_t offset, size_t bytes, int lane, uintptr_t pc);

  size_t cells_;
  int warps_;
  std::vector<uint32_t> writes_;  // (cells): last write
  std::vector<uint32_t> reads_;   // (warps, cells): last read
  std::array<Clocks, kMaxWarps> clocks_{};
};

// Global memory: the allowed ranges, and in those that can be written every thread that wrote or read a pair of bytes
// in this launch. Communication through global memory within a launch is an error, inside a block too.
class GlobalShadow {
 public:
  GlobalShadow(const std::vector<Range>& ranges, LaunchCounts* counts);
  void access(const Thread& thread, uintptr_t address, size_t bytes, Access access, uintptr_t pc);

 private:
  struct Cell {
    uint32_t writer, reader;  // thread of the launch + 1
  };
  struct Sector {
    uint32_t read, written;  // block + 1 that did it last
  };
  struct Region {
    Range range;
    SparseArray<Cell> cells;      // of pairs of bytes, empty where nothing is written
    SparseArray<Sector> sectors;  // empty unless counted
    RangeCounts* counts;
  };
  Region& region(const Thread& thread, uintptr_t address, size_t bytes, Access access, uintptr_t pc);

  std::vector<Region> regions_;
  size_t last_ = 0;  // region found last
};

}  // namespace emulator
