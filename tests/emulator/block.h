// The state of one running block: its threads as fibers, warps, barriers, shared memory; and the scheduler that moves
// between them. An OS thread runs one block at a time, so nothing in here is locked.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxWarps = 32;
constexpr int kNamedBarriers = 8;
constexpr size_t kStackBytes = 256 * 1024;                                // of a fiber, its lowest page a guard
constexpr size_t kSharedWindow = 512 * 1024, kSharedOffset = 128 * 1024;  // shared memory in its mapping
constexpr unsigned kFullWarp = 0xffffffffu;

struct Block;
struct Warp;
class Tracker;

struct Copy {
  unsigned char* to;          // shared, 16 bytes
  const unsigned char* from;  // global; null: zeros
};

struct Thread {
  void* stack_pointer = nullptr;
  uintptr_t stack = 0;  // lowest address
  uint3 index{};
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  const char* waits_at = nullptr;  // null while it can run
  uintptr_t waits_pc = 0;
  Tracker* tracker = nullptr;  // null: accesses are not followed
  std::vector<Copy> copies;    // issued, not landed
  std::vector<size_t> groups;  // committed: number of copies in each
  size_t open_copies = 0;      // issued after the last commit
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// A collective that some lanes of a warp have reached. finish() does the work once all are there, and returns whether
// the lanes go on; if not, somebody else resumes the warp.
struct Collective;
using Finish = bool (*)(Warp& warp, const Collective& collective);
struct Collective {
  Finish finish;
  unsigned mask;  // lanes that must come
  unsigned arrived;
  const char* name;
  uintptr_t pc;
  std::array<void*, kLanes> arguments;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  Thread* threads = nullptr;  // of its lanes
  unsigned live = 0;          // lanes that have not returned
  unsigned runnable = 0;      // lanes that could run, the running one left out
  std::vector<Collective> collectives;
};

using Clocks = std::array<uint32_t, kMaxWarps>;  // of every warp (shadow.h)

struct Barrier {
  int threads = 0;  // expected
  int arrived = 0;
  unsigned warps = 0;    // that arrived
  unsigned waiting = 0;  // those of them that wait
  Clocks clocks{};       // joined, of those that arrived
};

struct Block {
  uint3 index{};
  dim3 size, grid;
  uint64_t number = 0;  // in the grid
  const char* name = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int live = 0;  // threads that have not returned
  Barrier block_barrier;
  std::array<Barrier, kNamedBarriers> barriers;
  unsigned char* shared = nullptr;  // in the middle of a window of its own
  uintptr_t shared_window = 0;
  size_t shared_bytes = 0;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t argument_bytes = 0;
  Tracker* tracker = nullptr;
  std::string error;
  std::vector<int> warp_order;  // the schedule's preference
  uint64_t random = 0;          // state of the schedule's generator

  void* main_stack_pointer = nullptr;
  void* stacks = nullptr;  // one mapping for all fibers
  size_t num_stacks = 0;
  void* main_fake_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;

  Block();
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Whether an address belongs to shared memory or lies near it: around it nothing else is mapped.
  bool is_shared(uintptr_t address) const { return address - shared_window < kSharedWindow; }
  // An error unless all of it lies in the shared memory that the launch asked for.
  void check_shared(uintptr_t address, size_t bytes, uintptr_t pc) const;

  // Runs every thread to its end; `error` says what went wrong, and the fibers are then abandoned.
  void run();
  uint64_t next_random();
};

// The fiber that runs on this OS thread; null in host code. Initial-exec: one instruction for the hooks.
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

enum class Order {
  kPlain,   // warps take turns at every collective
  kSkewed,  // a warp runs as far as its barriers allow before another one does
  kRandom,
};
struct Schedule {
  Order order = Order::kSkewed;
  uint64_t seed = 0;
};
Schedule& schedule();

// Ends the launch with an error about the current thread; `pc`, where it is known, becomes a line of the source.
[[noreturn]] void fail(const std::string& what, uintptr_t pc = 0);

// The lanes of `mask` that have not returned meet.
void meet(const char* name, unsigned mask, void* argument, Finish finish, uintptr_t pc);
void resume(Warp& warp);
void block_until_resumed();

// An address of the code inside an error message, and the message with " [file.cuh:12]" for each.
std::string mark_line(uintptr_t pc);
std::string with_lines(const std::string& text);
void thread_ended(Thread& thread);

}  // namespace emulator
