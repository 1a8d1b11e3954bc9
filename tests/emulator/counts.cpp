#include "counts.h"

#include <algorithm>

namespace emulator {

Wavefronts wavefronts(unsigned lanes, const uintptr_t* addresses, size_t bytes) {
  constexpr int kBanks = 32, kBankBytes = 4;
  const int group = std::min<int>(32, 128 / static_cast<int>(std::max<size_t>(bytes, kBankBytes)));
  Wavefronts result;
  for (int first = 0; first < 32; first += group) {
    std::array<uintptr_t, 64> words;  // distinct ones, of up to 32 lanes
    size_t count = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uintptr_t word = addresses[lane] / kBankBytes; word <= (addresses[lane] + bytes - 1) / kBankBytes; ++word)
        if (std::find(words.begin(), words.begin() + count, word) == words.begin() + count) words[count++] = word;
    }
    if (count == 0) continue;
    std::array<uint64_t, kBanks> of_bank{};
    for (size_t i = 0; i < count; ++i) ++of_bank[words[i] % kBanks];
    result.actual += *std::max_element(of_bank.begin(), of_bank.end());
    result.ideal += (count + kBanks - 1) / kBanks;
  }
  return result;
}

void Coalescer::add(int warp, int lane, Kind kind, uintptr_t address, size_t bytes, uintptr_t pc) {
  Place& place =
      places_[warp].try_emplace(pc * 4 + static_cast<uintptr_t>(kind), Place{kind, bytes, {}, 0, {}}).first->second;
  const size_t at = place.next[lane]++;
  if (at >= place.instructions.size()) place.instructions.emplace_back();
  place.used = std::max(place.used, at + 1);
  Instruction& instruction = place.instructions[at];
  instruction.lanes |= 1u << lane;
  instruction.addresses[lane] = address;
}

void Coalescer::flush(int warp) {
  for (auto& [key, place] : places_[warp]) {
    for (size_t i = 0; i < place.used; ++i) {
      count(place, place.instructions[i]);
      place.instructions[i].lanes = 0;
    }
    place.used = 0;
    place.next.fill(0);
  }
}

void Coalescer::count(const Place& place, const Instruction& instruction) {
  if (place.kind == Kind::kGlobal) {
    std::vector<uintptr_t> sectors;
    for (int lane = 0; lane < 32; ++lane)
      if (instruction.lanes >> lane & 1)
        for (uintptr_t s = instruction.addresses[lane] / kSectorBytes;
             s <= (instruction.addresses[lane] + place.bytes - 1) / kSectorBytes; ++s)
          sectors.push_back(s);
    std::sort(sectors.begin(), sectors.end());
    counts_.global_sectors += static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    ++counts_.global_requests;
    return;
  }
  const Wavefronts added = wavefronts(instruction.lanes, instruction.addresses.data(), place.bytes);
  Wavefronts& sum = place.kind == Kind::kLoad    ? counts_.loads
                    : place.kind == Kind::kStore ? counts_.stores
                                                 : counts_.copies;
  sum.actual += added.actual;
  sum.ideal += added.ideal;
}

}  // namespace emulator
