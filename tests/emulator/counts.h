// What a launch did, for tests that hold kernels to their bounds: memory sectors, shared wavefronts, matrix
// instructions, barriers. A wavefront is one pass of shared memory: 32 banks of 4 bytes.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

constexpr int kSectorBytes = 32;
constexpr int kSchedulers = 4;  // of a multiprocessor: warp w runs on w % 4

struct Wavefronts {
  uint64_t actual = 0;
  uint64_t ideal = 0;  // were there no bank conflicts
};

// Sectors of one allowed range: distinct ones in the launch, and the sum over blocks of those distinct in the block.
struct Sectors {
  uint64_t launch = 0;
  uint64_t blocks = 0;
};
struct RangeCounts {
  uintptr_t data = 0;
  uint64_t bytes = 0;
  Sectors read, written;
};

struct LaunchCounts {
  std::string name;
  std::array<unsigned, 3> grid{};
  int threads = 0;  // a block
  int shared_bytes = 0;
  std::vector<RangeCounts> ranges;
  uint64_t global_requests = 0;                // memory instructions of warps
  uint64_t global_sectors = 0;                 // summed over requests
  Wavefronts ldmatrix, loads, stores, copies;  // copies: cp.async
  uint64_t shared_bytes_read = 0;
  uint64_t shared_bytes_written = 0;
  std::array<uint64_t, kSchedulers> mma_k8{};  // m16n8k8 by scheduler, m16n8k16 as two
  uint64_t exponentials = 0;                   // of threads
  uint64_t block_barriers = 0;
  uint64_t named_barriers = 0;
};

// Null unless a test counts.
std::vector<LaunchCounts>* counted_launches();

// Brings the accesses of single threads together into the instructions of their warp: those of one place in the code,
// the first of each lane since the warp last met, then the second of each, and so on.
class Coalescer {
 public:
  explicit Coalescer(LaunchCounts& counts) : counts_(counts) {}
  enum class Kind { kGlobal, kLoad, kStore, kCopy };
  void add(int warp, int lane, Kind kind, uintptr_t address, size_t bytes, uintptr_t pc);
  // The lanes of the warp have met, or returned.
  void flush(int warp);

 private:
  struct Instruction {
    unsigned lanes = 0;
    std::array<uintptr_t, 32> addresses;
  };
  struct Place {
    Kind kind;
    size_t bytes;
    std::vector<Instruction> instructions;  // in the order of a lane
    size_t used = 0;
    std::array<uint32_t, 32> next{};  // of each lane
  };
  void count(const Place& place, const Instruction& instruction);

  LaunchCounts& counts_;
  std::array<std::unordered_map<uintptr_t, Place>, 32> places_;  // by warp, kind and address of the code
};

// Wavefronts of `lanes` that access `bytes` each: 128 / bytes neighbouring lanes go together, a bank gives one word.
Wavefronts wavefronts(unsigned lanes, const uintptr_t* addresses, size_t bytes);

}  // namespace emulator
