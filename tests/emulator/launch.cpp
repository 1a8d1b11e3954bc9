// Launches: the limits of the device, the memory a kernel may touch, and the blocks of a grid, in order.
#include "launch.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <thread>

#include "tracker.h"

namespace emulator {
namespace {

std::mutex launching;

// Blocks with their stacks, kept for the next launch.
std::vector<std::unique_ptr<Block>> spare_blocks;

std::unique_ptr<Block> take_block() {
  if (spare_blocks.empty()) return std::make_unique<Block>();
  std::unique_ptr<Block> block = std::move(spare_blocks.back());
  spare_blocks.pop_back();
  return block;
}

}  // namespace

DeviceLimits& device_limits() {
  static DeviceLimits limits{108, 163 * 1024, 80};
  return limits;
}
const DeviceLimits& device() { return device_limits(); }

BlocksRun& blocks_run() {
  static BlocksRun range;
  return range;
}
Tracking& tracking() {
  static Tracking t;
  return t;
}

std::vector<Range>& allowed() {
  static std::vector<Range> ranges;
  return ranges;
}
namespace {
std::vector<std::vector<Range>> outer_scopes;
}
Scope::Scope() {
  outer_scopes.push_back(std::move(allowed()));
  allowed().clear();
}
Scope::~Scope() {
  allowed() = std::move(outer_scopes.back());
  outer_scopes.pop_back();
}

void allow(const void* data, size_t bytes, bool is_writable) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  Range added{begin, begin + bytes, is_writable};
  std::vector<Range> ranges;
  for (const Range& range : allowed()) {
    if (range.end <= added.begin || added.end <= range.begin) {
      ranges.push_back(range);
    } else {
      added = {std::min(range.begin, added.begin), std::max(range.end, added.end),
               range.is_writable || added.is_writable};
    }
  }
  ranges.push_back(added);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  allowed() = std::move(ranges);
}

void run(const char* name, dim3 grid, int threads, int shared_bytes, void (*kernel)(const void*), const void* arguments,
         size_t argument_bytes) {
  const std::lock_guard<std::mutex> lock(launching);
  const auto check = [&](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(std::string(name) + ": " + what);
  };
  check(threads >= 1 && threads <= 1024, "a block has 1 to 1024 threads, got " + std::to_string(threads));
  check(grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535,
        "grid must be within (2^31 - 1, 65535, 65535), got (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
            ", " + std::to_string(grid.z) + ")");
  check(shared_bytes >= 0 && shared_bytes <= device().max_shared_bytes,
        "shared memory must be at most " + std::to_string(device().max_shared_bytes) + " bytes, got " +
            std::to_string(shared_bytes));
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<LaunchCounts>* const launches = counted_launches();
  LaunchCounts counts;
  counts.name = name;
  counts.grid = {grid.x, grid.y, grid.z};
  counts.threads = threads;
  counts.shared_bytes = shared_bytes;

  const Tracking& tracking = emulator::tracking();
  check(!tracking.is_on || blocks * static_cast<uint64_t>(threads) < 0xfffffff0u,
        "at most 2^32 threads can be followed: run it untracked");
  check(tracking.is_on || launches == nullptr, "what is counted must be tracked");
  std::atomic<uint64_t> next{blocks_run().first};
  const uint64_t end = std::min(blocks, blocks_run().end);
  std::mutex reporting;
  std::string error;  // of the first that failed
  const auto work = [&](Block& block) {
    block.name = name;
    block.size = dim3(static_cast<unsigned>(threads));
    block.grid = grid;
    block.threads.resize(static_cast<size_t>(threads));
    block.kernel = kernel;
    block.arguments = arguments;
    block.argument_bytes = argument_bytes;
    block.shared_bytes = static_cast<size_t>(shared_bytes);
    std::optional<Tracker> tracker;
    if (tracking.is_on) tracker.emplace(block, allowed(), launches != nullptr ? &counts : nullptr);
    block.tracker = tracker ? &*tracker : nullptr;
    for (uint64_t b; (b = next++) < end;) {
      block.number = b;
      block.index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
      block.run();
      if (block.error.empty()) continue;
      const std::lock_guard<std::mutex> lock(reporting);
      if (error.empty()) error = block.error;
      next = end;
    }
    block.tracker = nullptr;
  };

  // Whoever is tracked is alone: shadow memory is of the launch.
  const uint64_t workers = tracking.is_on ? 1 : std::min<uint64_t>(tracking.os_threads, blocks);
  std::vector<std::unique_ptr<Block>> running;
  for (uint64_t i = 0; i < workers; ++i) running.push_back(take_block());
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back([&, i] { work(*running[i]); });
  work(*running[0]);
  for (std::thread& other : others) other.join();
  for (std::unique_ptr<Block>& block : running) spare_blocks.push_back(std::move(block));
  if (launches != nullptr) launches->push_back(counts);
  if (!error.empty()) throw std::runtime_error(with_lines(error));
}

}  // namespace emulator
