// What tests set and ask, for ctypes (tests/emulated.py).
#include <string>

#include "counts.h"
#include "launch.h"

#define MPLUG2_CONTROL extern "C" __attribute__((visibility("default")))

MPLUG2_CONTROL void emulator_set_device(int num_multiprocessors, int max_shared_bytes, int capability) {
  emulator::device_limits() = {num_multiprocessors, max_shared_bytes, capability};
}
MPLUG2_CONTROL void emulator_set_tracking(bool is_on, unsigned os_threads) {
  emulator::tracking() = {is_on, os_threads};
}
MPLUG2_CONTROL void emulator_set_blocks(uint64_t first, uint64_t end) { emulator::blocks_run() = {first, end}; }
MPLUG2_CONTROL void emulator_set_schedule(int order, uint64_t seed) {
  emulator::schedule() = {static_cast<emulator::Order>(order), seed};
}

namespace emulator {
namespace {

bool counting = false;
std::vector<LaunchCounts> launches;

std::string json(const Wavefronts& w) {
  return "{\"actual\":" + std::to_string(w.actual) + ",\"ideal\":" + std::to_string(w.ideal) + "}";
}
std::string json(const Sectors& s) {
  return "{\"launch\":" + std::to_string(s.launch) + ",\"blocks\":" + std::to_string(s.blocks) + "}";
}
template <class Items, class ToString>
std::string json_list(const Items& items, ToString to_string) {
  std::string text;
  for (const auto& item : items) text += (text.empty() ? "" : ",") + to_string(item);
  return "[" + text + "]";
}
std::string json(const RangeCounts& r) {
  return "{\"data\":" + std::to_string(r.data) + ",\"bytes\":" + std::to_string(r.bytes) + ",\"read\":" + json(r.read) +
         ",\"written\":" + json(r.written) + "}";
}
std::string json(const LaunchCounts& c) {
  const auto number = [](auto n) { return std::to_string(n); };
  return "{\"name\":\"" + c.name + "\",\"grid\":" + json_list(c.grid, number) + ",\"threads\":" + number(c.threads) +
         ",\"shared_bytes\":" + number(c.shared_bytes) +
         ",\"ranges\":" + json_list(c.ranges, [](const RangeCounts& r) { return json(r); }) +
         ",\"global_requests\":" + number(c.global_requests) + ",\"global_sectors\":" + number(c.global_sectors) +
         ",\"ldmatrix\":" + json(c.ldmatrix) + ",\"loads\":" + json(c.loads) + ",\"stores\":" + json(c.stores) +
         ",\"copies\":" + json(c.copies) + ",\"shared_bytes_read\":" + number(c.shared_bytes_read) +
         ",\"shared_bytes_written\":" + number(c.shared_bytes_written) + ",\"mma_k8\":" + json_list(c.mma_k8, number) +
         ",\"exponentials\":" + number(c.exponentials) + ",\"block_barriers\":" + number(c.block_barriers) +
         ",\"named_barriers\":" + number(c.named_barriers) + "}";
}

}  // namespace

std::vector<LaunchCounts>* counted_launches() { return counting ? &launches : nullptr; }

}  // namespace emulator

MPLUG2_CONTROL void emulator_count(bool is_counting) { emulator::counting = is_counting; }
// The launches counted since the last call, as JSON; valid until the next call.
MPLUG2_CONTROL const char* emulator_take_counts() {
  static std::string text;
  text = emulator::json_list(emulator::launches, [](const emulator::LaunchCounts& c) { return emulator::json(c); });
  emulator::launches.clear();
  return text.c_str();
}
