#include "tracker.h"

#include <link.h>

namespace emulator {
namespace {

// Constants of the code: the read-only part of the file that holds the kernels.
struct Image {
  uintptr_t begin = 0, end = 0;
};

std::vector<Image> find_constants() {
  std::vector<Image> found;
  const auto visit = [](dl_phdr_info* info, size_t, void* to) {
    auto& images = *static_cast<std::vector<Image>*>(to);
    std::vector<Image> read_only;
    bool is_ours = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type != PT_LOAD) continue;
      const uintptr_t begin = info->dlpi_addr + part.p_vaddr, end = begin + part.p_memsz;
      const auto here = reinterpret_cast<uintptr_t>(&find_constants);
      is_ours |= here >= begin && here < end;
      if (!(part.p_flags & PF_W)) read_only.push_back({begin, end});
    }
    if (is_ours) images = read_only;
    return 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

bool is_constant(uintptr_t address) {
  static const std::vector<Image> images = find_constants();
  for (const Image& image : images)
    if (address >= image.begin && address < image.end) return true;
  return false;
}

}  // namespace

Tracker::Tracker(const Block& block, const std::vector<Range>& ranges, LaunchCounts* counts)
    : shared(block.shared_bytes, static_cast<int>((block.size.x + kLanes - 1) / kLanes)),
      global(ranges, counts),
      counts(counts),
      arguments_(reinterpret_cast<uintptr_t>(block.arguments)),
      argument_bytes_(block.argument_bytes) {
  if (counts != nullptr) coalescer_.emplace(*counts);
}

void Tracker::access(const Thread& thread, uintptr_t address, size_t bytes, Access access, uintptr_t pc) {
  const Block& block = *thread.block;
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.shared);
  if (block.is_shared(address)) {
    block.check_shared(address, bytes, pc);
    shared.access(thread, offset, bytes, access, pc);
    if (counts == nullptr) return;
    if (access != Access::kWrite) {
      counts->shared_bytes_read += bytes;
      coalescer_->add(thread.warp->index, thread.lane, Coalescer::Kind::kLoad, offset, bytes, pc);
    }
    if (access != Access::kRead) {
      counts->shared_bytes_written += bytes;
      coalescer_->add(thread.warp->index, thread.lane, Coalescer::Kind::kStore, offset, bytes, pc);
    }
    return;
  }
  if (access == Access::kRead && (address - arguments_ < argument_bytes_ || is_constant(address))) return;
  global.access(thread, address, bytes, access, pc);
  if (counts != nullptr) coalescer_->add(thread.warp->index, thread.lane, Coalescer::Kind::kGlobal, address, bytes, pc);
}

void Tracker::issue_copy(const Thread& thread, const Copy& copy, uintptr_t pc) {
  const uintptr_t offset = static_cast<uintptr_t>(copy.to - thread.block->shared);
  shared.issue(thread, offset, pc);
  if (copy.from != nullptr) global.access(thread, reinterpret_cast<uintptr_t>(copy.from), 16, Access::kRead, pc);
  if (counts == nullptr) return;
  counts->shared_bytes_written += 16;
  coalescer_->add(thread.warp->index, thread.lane, Coalescer::Kind::kCopy, offset, 16, pc);
  if (copy.from != nullptr)
    coalescer_->add(thread.warp->index, thread.lane, Coalescer::Kind::kGlobal, reinterpret_cast<uintptr_t>(copy.from),
                    16, pc);
}

void Tracker::read_matrix(const Thread& thread, const std::array<uintptr_t, 8>& rows, uintptr_t pc) {
  std::array<uintptr_t, kLanes> offsets{};
  for (size_t i = 0; i < rows.size(); ++i) {
    offsets[i] = rows[i] - reinterpret_cast<uintptr_t>(thread.block->shared);
    shared.read_row(thread, offsets[i], pc);
  }
  if (counts == nullptr) return;
  const Wavefronts added = wavefronts(0xff, offsets.data(), 16);
  counts->ldmatrix.actual += added.actual;
  counts->ldmatrix.ideal += added.ideal;
  counts->shared_bytes_read += 128;
}

void Tracker::met(const Warp& warp) {
  if (coalescer_) coalescer_->flush(warp.index);
}

}  // namespace emulator
