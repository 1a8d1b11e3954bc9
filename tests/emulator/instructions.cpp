// What a thread can execute beyond plain loads and stores: warp collectives, matrix products, asynchronous copies,
// barriers. The last lane to arrive does the work for its warp, with the other lanes' registers at hand on their
// stacks.
#include <cstring>

#include "access.h"

namespace emulator {

uint3 thread_index() { return current->index; }
uint3 block_index() { return current->block->index; }
dim3 block_size() { return current->block->size; }
dim3 grid_size() { return current->block->grid; }
unsigned char* shared_memory() { return current->block->shared; }

// ---- shuffles, votes ------------------------------------------------------------------------------------------------
namespace {

struct ShuffleArguments {
  uint64_t value;
  int source;  // lane
  uint64_t result;
};

bool finish_shuffle(Warp&, const Collective& c) {
  for (unsigned lanes = c.arrived; lanes != 0; lanes &= lanes - 1) {
    auto& own = *static_cast<ShuffleArguments*>(c.arguments[__builtin_ctz(lanes)]);
    if (!(c.arrived >> own.source & 1))
      fail(std::string(c.name) + ": lane " + std::to_string(__builtin_ctz(lanes)) + " reads lane " +
           std::to_string(own.source) + ", which takes no part");
    own.result = static_cast<ShuffleArguments*>(c.arguments[own.source])->value;
  }
  return true;
}

struct BallotArguments {
  bool is_set;
  unsigned result;
};

bool finish_ballot(Warp&, const Collective& c) {
  unsigned result = 0;
  for (unsigned lanes = c.arrived; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    result |= static_cast<unsigned>(static_cast<BallotArguments*>(c.arguments[lane])->is_set) << lane;
  }
  for (unsigned lanes = c.arrived; lanes != 0; lanes &= lanes - 1)
    static_cast<BallotArguments*>(c.arguments[__builtin_ctz(lanes)])->result = result;
  return true;
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width) {
  if (width <= 0 || width > kLanes || (width & (width - 1)) != 0)
    fail("shuffle: width must be a power of two up to 32");
  const int lane = current->lane, first = lane & ~(width - 1);
  int source = lane;
  switch (kind) {
    case Shuffle::kIndex:
      source = first | (operand & (width - 1));
      break;
    case Shuffle::kXor:
      source = lane ^ operand;
      if (source >= first + width) source = lane;
      break;
    case Shuffle::kUp:
      source = lane - operand >= first ? lane - operand : lane;
      break;
    case Shuffle::kDown:
      source = lane + operand < first + width ? lane + operand : lane;
      break;
  }
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync"};
  ShuffleArguments arguments{value, source, 0};
  meet(kNames[static_cast<int>(kind)], mask, &arguments, finish_shuffle, MPLUG2_CALLER);
  return arguments.result;
}

unsigned ballot(unsigned mask, bool is_set) {
  BallotArguments arguments{is_set, 0};
  meet("a vote", mask, &arguments, finish_ballot, MPLUG2_CALLER);
  return arguments.result;
}

// ---- ldmatrix, mma --------------------------------------------------------------------------------------------------
namespace {

void need_whole_warp(const Collective& c) {
  if (c.arrived != kFullWarp) fail(std::string(c.name) + ": needs all 32 lanes of the warp", c.pc);
}

LaunchCounts* counts_of(const Block& block) { return block.tracker != nullptr ? block.tracker->counts : nullptr; }

struct LdmatrixArguments {
  uint32_t* r;
  const unsigned char* row;
  int count;
  bool is_transposed;
};

bool finish_ldmatrix(Warp& warp, const Collective& c) {
  need_whole_warp(c);
  const Block& block = *warp.block;
  const auto of = [&](int lane) -> LdmatrixArguments& { return *static_cast<LdmatrixArguments*>(c.arguments[lane]); };
  const int count = of(0).count;
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t elements[8][8];
    std::array<uintptr_t, 8> rows;
    for (int row = 0; row < 8; ++row) {
      rows[row] = reinterpret_cast<uintptr_t>(of(matrix * 8 + row).row);
      if (rows[row] % 16 != 0)
        fail("ldmatrix: the row of lane " + std::to_string(matrix * 8 + row) + " is not aligned to 16 bytes", c.pc);
      block.check_shared(rows[row], 16, c.pc);
    }
    if (block.tracker != nullptr) block.tracker->read_matrix(*current, rows, c.pc);
    for (int row = 0; row < 8; ++row) std::memcpy(elements[row], of(matrix * 8 + row).row, 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint32_t low = of(0).is_transposed ? elements[t][g] : elements[g][t];
      const uint32_t high = of(0).is_transposed ? elements[t + 1][g] : elements[g][t + 1];
      of(lane).r[matrix] = low | high << 16;
    }
  }
  return true;
}

struct MmaArguments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

float element(__nv_bfloat16, uint32_t bits) { return __uint_as_float(bits << 16); }
float element(__half, uint32_t bits) { return __half2float({static_cast<uint16_t>(bits)}); }

typedef float Columns __attribute__((vector_size(32)));

// d (16 x 8) += a (16 x kDepth) b (kDepth x 8), float32 sums in the order of k.
template <class T, int kDepth>
bool finish_mma(Warp& warp, const Collective& c) {
  need_whole_warp(c);
  if (LaunchCounts* counts = counts_of(*warp.block)) counts->mma_k8[warp.index % kSchedulers] += kDepth / 8;
  float a[16][kDepth];
  Columns b[kDepth], d[16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaArguments*>(c.arguments[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int part = 0; part < kDepth / 8; ++part)
      for (int i = 0; i < 2; ++i) {
        const uint32_t upper = own.a[2 * part] >> (16 * i) & 0xffff, lower = own.a[2 * part + 1] >> (16 * i) & 0xffff;
        a[g][8 * part + t + i] = element(T{}, upper);
        a[g + 8][8 * part + t + i] = element(T{}, lower);
        b[8 * part + t + i][g] = element(T{}, own.b[part] >> (16 * i) & 0xffff);
      }
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][t + i % 2] = own.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    Columns sum = d[row];
    for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
    d[row] = sum;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaArguments*>(c.arguments[lane]);
    for (int i = 0; i < 4; ++i) own.d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
  return true;
}

}  // namespace

void ldmatrix(uint32_t* r, const void* row, int count, bool is_transposed) {
  LdmatrixArguments arguments{r, static_cast<const unsigned char*>(row), count, is_transposed};
  meet(count == 4 ? (is_transposed ? "ldmatrix x4 transposed" : "ldmatrix x4")
                  : (is_transposed ? "ldmatrix x2 transposed" : "ldmatrix x2"),
       kFullWarp, &arguments, finish_ldmatrix, MPLUG2_CALLER);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArguments arguments{d, a, {b0, b1}};
  meet("mma m16n8k16", kFullWarp, &arguments, finish_mma<T, 16>, MPLUG2_CALLER);
}
template <class T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  MmaArguments arguments{d, a, {b, 0}};
  meet("mma m16n8k8", kFullWarp, &arguments, finish_mma<T, 8>, MPLUG2_CALLER);
}
template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_m16n8k16<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_m16n8k8<__nv_bfloat16>(float (&)[4], const uint32_t (&)[2], uint32_t);
template void mma_m16n8k8<__half>(float (&)[4], const uint32_t (&)[2], uint32_t);

float exp2(float x) {
  if (current != nullptr)
    if (LaunchCounts* counts = counts_of(*current->block)) ++counts->exponentials;
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

// ---- cp.async: late on purpose ------------------------------------------------------------------------------------
void cp_async16(void* to_shared, const void* from, bool is_valid) {
  Thread& self = *current;
  const uintptr_t pc = MPLUG2_CALLER;
  const Copy copy{static_cast<unsigned char*>(to_shared), is_valid ? static_cast<const unsigned char*>(from) : nullptr};
  if (reinterpret_cast<uintptr_t>(to_shared) % 16 != 0 || reinterpret_cast<uintptr_t>(copy.from) % 16 != 0)
    fail("cp.async: address not aligned to 16 bytes", pc);
  self.block->check_shared(reinterpret_cast<uintptr_t>(to_shared), 16, pc);
  if (self.tracker != nullptr) self.tracker->issue_copy(self, copy, pc);
  std::memset(to_shared, 0xff, 16);
  self.copies.push_back(copy);
  ++self.open_copies;
}
void cp_async_commit() {
  current->groups.push_back(current->open_copies);
  current->open_copies = 0;
}
void cp_async_wait(int groups) {
  Thread& self = *current;
  size_t landed = 0, ended = 0;
  while (self.groups.size() - ended > static_cast<size_t>(groups)) landed += self.groups[ended++];
  for (size_t i = 0; i < landed; ++i) {
    const Copy& copy = self.copies[i];
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
    if (self.tracker != nullptr) self.tracker->shared.land(self, static_cast<size_t>(copy.to - self.block->shared));
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(landed));
  self.groups.erase(self.groups.begin(), self.groups.begin() + static_cast<ptrdiff_t>(ended));
}

// ---- barriers: counted in whole warps -----------------------------------------------------------------------------
namespace {

struct BarrierArguments {
  int id;
  int threads;
};

// Those that wait go on.
void complete(Block& block, Barrier& barrier) {
  for (unsigned waiting = barrier.waiting; waiting != 0; waiting &= waiting - 1) {
    Warp& warp = block.warps[__builtin_ctz(waiting)];
    if (block.tracker != nullptr) block.tracker->shared.depart(warp.index, barrier.clocks);
    resume(warp);
  }
  if (LaunchCounts* counts = counts_of(block))
    ++(&barrier == &block.block_barrier ? counts->block_barriers : counts->named_barriers);
  barrier = {};
}

// Returns whether the barrier is complete.
bool arrive(Warp& warp, Barrier& barrier, const Collective& c, int threads, bool waits) {
  if (barrier.arrived > 0 && barrier.threads != threads)
    fail(std::string(c.name) + ": counts " + std::to_string(threads) + " threads, others at this barrier " +
             std::to_string(barrier.threads),
         c.pc);
  if (barrier.warps >> warp.index & 1)
    fail(std::string(c.name) + ": the warp arrives twice before the others do", c.pc);
  barrier.threads = threads;
  barrier.arrived += kLanes;
  barrier.warps |= 1u << warp.index;
  if (waits) barrier.waiting |= 1u << warp.index;
  if (warp.block->tracker != nullptr) warp.block->tracker->shared.arrive(warp.index, barrier.clocks);
  if (barrier.arrived < threads) return false;
  complete(*warp.block, barrier);
  return true;
}

int live_warps(const Block& block) {
  int count = 0;
  for (const Warp& warp : block.warps) count += warp.live != 0;
  return count;
}

// Of the warps that have not returned: an expectation may shrink while others wait.
bool finish_block_barrier(Warp& warp, const Collective& c) {
  Barrier& barrier = warp.block->block_barrier;
  barrier.threads = live_warps(*warp.block) * kLanes;
  return arrive(warp, barrier, c, barrier.threads, true);
}

Barrier& named(Warp& warp, const Collective& c, int& threads) {
  const auto& first = *static_cast<BarrierArguments*>(c.arguments[__builtin_ctz(c.arrived)]);
  threads = first.threads;
  if (first.id < 0 || first.id >= kNamedBarriers)
    fail(std::string(c.name) + ": id must be 0 to 7, got " + std::to_string(first.id), c.pc);
  if (threads <= 0 || threads % kLanes != 0 || threads > static_cast<int>(warp.block->warps.size()) * kLanes)
    fail(std::string(c.name) + ": threads must be whole warps of the block, got " + std::to_string(threads), c.pc);
  for (unsigned lanes = c.arrived; lanes != 0; lanes &= lanes - 1) {
    const auto& own = *static_cast<BarrierArguments*>(c.arguments[__builtin_ctz(lanes)]);
    if (own.id != first.id || own.threads != threads)
      fail(std::string(c.name) + ": lanes of a warp name different barriers", c.pc);
  }
  return warp.block->barriers[first.id];
}

bool finish_named_sync(Warp& warp, const Collective& c) {
  int threads;
  Barrier& barrier = named(warp, c, threads);
  return arrive(warp, barrier, c, threads, true);
}
bool finish_named_arrive(Warp& warp, const Collective& c) {
  int threads;
  Barrier& barrier = named(warp, c, threads);
  arrive(warp, barrier, c, threads, false);
  return true;
}

// Part of a warp orders nothing here: clocks are those of whole warps.
bool finish_sync_warp(Warp& warp, const Collective& c) {
  if (warp.block->tracker != nullptr && c.arrived == warp.live) warp.block->tracker->shared.sync_warp(warp.index);
  return true;
}

}  // namespace

void named_barrier_sync(int id, int threads) {
  BarrierArguments arguments{id, threads};
  meet("named_barrier_sync", kFullWarp, &arguments, finish_named_sync, MPLUG2_CALLER);
}
void named_barrier_arrive(int id, int threads) {
  BarrierArguments arguments{id, threads};
  meet("named_barrier_arrive", kFullWarp, &arguments, finish_named_arrive, MPLUG2_CALLER);
}

void thread_ended(Thread& self) {
  Warp& warp = *self.warp;
  Block& block = *self.block;
  warp.live &= ~(1u << self.lane);
  --block.live;
  for (size_t i = 0; i < warp.collectives.size(); ++i) {
    const Collective c = warp.collectives[i];
    if (c.arrived != (c.mask & warp.live)) continue;
    warp.collectives.erase(warp.collectives.begin() + static_cast<ptrdiff_t>(i--));
    if (c.finish(warp, c)) warp.runnable |= c.arrived;
  }
  if (warp.live != 0) return;
  if (block.tracker != nullptr) block.tracker->met(warp);
  Barrier& barrier = block.block_barrier;
  if (barrier.arrived > 0 && barrier.arrived == live_warps(block) * kLanes) complete(block, barrier);
  if (block.live > 0) return;
  for (int id = 0; id < kNamedBarriers; ++id)
    if (block.barriers[id].arrived > 0)
      fail("the block ends with " + std::to_string(block.barriers[id].arrived) + " of " +
           std::to_string(block.barriers[id].threads) + " threads at named barrier " + std::to_string(id));
}

}  // namespace emulator

void __syncthreads() {
  emulator::meet("__syncthreads", emulator::kFullWarp, nullptr, emulator::finish_block_barrier, MPLUG2_CALLER);
}
void __syncwarp(unsigned mask) {
  emulator::meet("__syncwarp", mask, nullptr, emulator::finish_sync_warp, MPLUG2_CALLER);
}
