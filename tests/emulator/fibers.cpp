// Fibers: stacks, switches between them, and which one runs next. Schedules are made to find mistakes: by default one
// warp runs as far ahead of the others as barriers allow.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>

#include "tracker.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee's registers of the System V ABI on the stack, and goes on where another fiber saved its own.
#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {

__thread Thread* current = nullptr;

namespace {

constexpr size_t kPage = 4096;

// Stack tops at one offset in every page would share few sets of the caches.
size_t stack_color(size_t thread) { return thread % 29 * 128; }

void switch_to_main(Thread& from, [[maybe_unused]] bool ends) {
  Block& block = *from.block;
  current = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, block.main_stack, block.main_stack_bytes);
#endif
  emulator_switch(&from.stack_pointer, block.main_stack_pointer);
}

void switch_to(Thread& from, Thread& to, [[maybe_unused]] bool ends = false) {
  current = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, reinterpret_cast<void*>(to.stack), kStackBytes);
#endif
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

int nth_set_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __builtin_ctz(bits);
}

// A lane of `warp` that can run, taken off its list.
Thread& take_lane(Warp& warp, int after) {
  int lane;
  if (schedule().order == Order::kRandom) {
    lane = nth_set_bit(warp.runnable, static_cast<int>(warp.block->next_random() % __builtin_popcount(warp.runnable)));
  } else {
    const unsigned later = after + 1 < kLanes ? warp.runnable >> (after + 1) << (after + 1) : 0;
    lane = __builtin_ctz(later != 0 ? later : warp.runnable);
  }
  warp.runnable &= ~(1u << lane);
  return warp.threads[lane];
}

// The warp to run next, null where none can.
Warp* choose_warp(Block& block, int after) {
  const int count = static_cast<int>(block.warps.size());
  if (schedule().order == Order::kRandom) {
    int runnable = 0;
    for (const Warp& warp : block.warps) runnable += warp.runnable != 0;
    if (runnable == 0) return nullptr;
    int n = static_cast<int>(block.next_random() % runnable);
    for (Warp& warp : block.warps)
      if (warp.runnable != 0 && n-- == 0) return &warp;
  }
  const bool is_plain = schedule().order == Order::kPlain;
  for (int i = 0; i < count; ++i) {
    Warp& warp = block.warps[is_plain ? (after + 1 + i) % count : block.warp_order[i]];
    if (warp.runnable != 0) return &warp;
  }
  return nullptr;
}

// "0-3,7".
std::string text_of(unsigned lanes) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const int first = lane;
    while (lane + 1 < kLanes && (lanes >> (lane + 1) & 1)) ++lane;
    text += (text.empty() ? "" : ",") + std::to_string(first) + (lane > first ? "-" + std::to_string(lane) : "");
  }
  return text;
}

[[noreturn]] void deadlock(Block& block) {
  std::string what;
  for (const Warp& warp : block.warps) {
    unsigned rest = warp.live;
    while (rest != 0) {
      const Thread& first = warp.threads[__builtin_ctz(rest)];
      unsigned lanes = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        if ((rest >> lane & 1) && warp.threads[lane].waits_pc == first.waits_pc) lanes |= 1u << lane;
      rest &= ~lanes;
      what += (what.empty() ? "leaves a deadlock: warp " : "; warp ") + std::to_string(warp.index) + " lanes " +
              text_of(lanes) + " at " + first.waits_at + mark_line(first.waits_pc);
    }
  }
  fail(what);
}

// Leaves a fiber that cannot go on.
void leave(Thread& self, bool ends) {
  Warp& warp = *self.warp;
  Block& block = *self.block;
  if (warp.runnable != 0) {
    switch_to(self, take_lane(warp, self.lane), ends);
  } else if (Warp* next = choose_warp(block, warp.index)) {
    switch_to(self, take_lane(*next, -1), ends);
  } else if (block.live == 0) {
    switch_to_main(self, ends);
  } else {
    deadlock(block);
  }
}

void fiber_main() {
  Thread& self = *current;
#if defined(__SANITIZE_ADDRESS__)
  Block& block = *self.block;
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (block.main_stack == nullptr) {
    block.main_stack = bottom;
    block.main_stack_bytes = bytes;
  }
#endif
  self.block->kernel(self.block->arguments);
  thread_ended(self);
  leave(self, /*ends=*/true);
  __builtin_unreachable();
}

}  // namespace

Schedule& schedule() {
  static Schedule s;
  return s;
}

uint64_t Block::next_random() {
  random += 0x9e3779b97f4a7c15u;  // splitmix64
  uint64_t x = random;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

void fail(const std::string& what, uintptr_t pc) {
  if (current == nullptr) throw std::runtime_error(what);
  const Thread& self = *current;
  Block& block = *self.block;
  const auto text = [](auto n) { return std::to_string(n); };
  block.error = std::string(block.name) + ": block (" + text(block.index.x) + ", " + text(block.index.y) + ", " +
                text(block.index.z) + "), thread " + text(self.index.x) + " (warp " + text(self.warp->index) +
                ", lane " + text(self.lane) + "): " + what + mark_line(pc);
  switch_to_main(*current, /*ends=*/true);
  __builtin_unreachable();
}

void block_until_resumed() {
  Thread& self = *current;
  leave(self, /*ends=*/false);
  self.waits_at = nullptr;
}

void resume(Warp& warp) { warp.runnable |= warp.live & ~(current->warp == &warp ? 1u << current->lane : 0u); }

void meet(const char* name, unsigned mask, void* argument, Finish finish, uintptr_t pc) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  if (!(mask >> self.lane & 1)) fail(std::string(name) + ": the mask leaves out the calling lane", pc);
  mask &= warp.live;
  auto at = std::find_if(warp.collectives.begin(), warp.collectives.end(), [&](const Collective& c) {
    return (c.mask & warp.live) == mask && !(c.arrived >> self.lane & 1);
  });
  if (at == warp.collectives.end()) {
    warp.collectives.push_back({finish, mask, 0, name, pc, {}});
    at = warp.collectives.end() - 1;
  }
  if (at->name != name && std::strcmp(at->name, name) != 0)
    fail(std::string(name) + ": lane " + std::to_string(__builtin_ctz(at->arrived)) + " of this warp is at " + at->name,
         pc);
  at->arrived |= 1u << self.lane;
  at->arguments[self.lane] = argument;
  if (at->arrived != mask) {
    self.waits_at = name;
    self.waits_pc = pc;
    block_until_resumed();
    return;
  }
  if (warp.block->tracker != nullptr && at->arrived == warp.live) warp.block->tracker->met(warp);
  const bool go_on = finish(warp, *at);
  warp.collectives.erase(at);
  if (!go_on) {
    self.waits_at = name;
    self.waits_pc = pc;
    block_until_resumed();
    return;
  }
  warp.runnable |= mask & ~(1u << self.lane);
  const Order order = schedule().order;
  if (order == Order::kPlain || (order == Order::kRandom && warp.block->next_random() % 4 == 0)) {
    if (Warp* next = choose_warp(*warp.block, warp.index)) {
      Thread& taken = take_lane(*next, -1);
      warp.runnable |= 1u << self.lane;
      switch_to(self, taken);
    }
  }
}

Block::Block() {
  void* const window =
      mmap(nullptr, kSharedWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (window == MAP_FAILED) throw std::bad_alloc();
  shared_window = reinterpret_cast<uintptr_t>(window);
  shared = static_cast<unsigned char*>(window) + kSharedOffset;
}

void Block::check_shared(uintptr_t address, size_t bytes, uintptr_t pc) const {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(shared);
  if (offset + bytes <= shared_bytes && offset < shared_bytes) return;
  if (!is_shared(address)) fail("names an address outside of shared memory", pc);
  fail("touches bytes " + std::to_string(static_cast<intptr_t>(offset)) + " to " +
           std::to_string(static_cast<intptr_t>(offset + bytes - 1)) + " of the " + std::to_string(shared_bytes) +
           " bytes of shared memory",
       pc);
}

Block::~Block() {
  munmap(reinterpret_cast<void*>(shared_window), kSharedWindow);
  if (stacks != nullptr) munmap(stacks, num_stacks * kStackBytes);
}

void Block::run() {
  const size_t count = threads.size();
  if (num_stacks < count) {
    if (stacks != nullptr) munmap(stacks, num_stacks * kStackBytes);
    stacks =
        mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    num_stacks = count;
    for (size_t i = 0; i < count; ++i) mprotect(static_cast<char*>(stacks) + i * kStackBytes, kPage, PROT_NONE);
  }
#if defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < count; ++i)  // of frames that an error left behind
    __asan_unpoison_memory_region(static_cast<char*>(stacks) + i * kStackBytes + kPage, kStackBytes - kPage);
#endif
  const int num_warps = static_cast<int>((count + kLanes - 1) / kLanes);
  warps.resize(num_warps);
  for (int w = 0; w < num_warps; ++w) {
    const size_t lanes = std::min<size_t>(kLanes, count - static_cast<size_t>(w) * kLanes);
    Warp& warp = warps[w];
    warp = {};
    warp.block = this;
    warp.index = w;
    warp.threads = &threads[static_cast<size_t>(w) * kLanes];
    warp.live = warp.runnable = lanes == kLanes ? kFullWarp : (1u << lanes) - 1;
  }
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack = reinterpret_cast<uintptr_t>(stacks) + i * kStackBytes;
    thread.index = {static_cast<unsigned>(i), 0, 0};
    thread.lane = static_cast<int>(i % kLanes);
    thread.warp = &warps[i / kLanes];
    thread.block = this;
    thread.waits_at = nullptr;
    thread.tracker = tracker;
    thread.copies.clear();
    thread.groups.clear();
    thread.open_copies = 0;
    thread.fake_stack = nullptr;
    void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - stack_color(i) - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.stack_pointer = top;
  }
  live = static_cast<int>(count);
  main_stack = nullptr;
  block_barrier = {};
  barriers.fill({});
  error.clear();
  std::memset(shared, 0xff, shared_bytes);  // NaN in every float type
  if (tracker != nullptr) tracker->begin_block();
  random = schedule().seed * 0x632be59bd9b4e019u + number;
  warp_order.resize(num_warps);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  if (schedule().order == Order::kSkewed && schedule().seed == 1) std::reverse(warp_order.begin(), warp_order.end());
  if (schedule().order == Order::kSkewed && schedule().seed > 1)
    for (int i = num_warps - 1; i > 0; --i) std::swap(warp_order[i], warp_order[next_random() % (i + 1)]);

  Thread& first = take_lane(*choose_warp(*this, -1), -1);
  current = &first;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake_stack, reinterpret_cast<void*>(first.stack), kStackBytes);
#endif
  emulator_switch(&main_stack_pointer, first.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

}  // namespace emulator
