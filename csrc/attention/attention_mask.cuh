// Which keys a query sees, as attention's tiled kernels ask it: the end of a row's keys, the end of a query's, and 32
// keys at a time as the bits of a word. Lengths and masks stay on the device.
#pragma once
#include "core/device.h"

namespace mplug2::attention {

// Query s of row b of k and v sees key j where j < key_lengths[b], key_mask[b, j], and j <= s + K - S where causal.
struct Mask {
  const void* key_lengths;  // (B) int64 or int32, or null
  const bool* key_mask;     // (B, K), or null
  int queries, keys;        // S and K, below 2^30
  bool has_wide_lengths;    // int64
  bool causal;
};

// What is seen of one row of k and v.
struct SeenKeys {
  int end;              // no query sees key `end` or one after it
  int lead;             // query s sees no key from s + lead on
  const uint8_t* mask;  // (K), or null

  MPLUG2_DEVICE SeenKeys(const Mask& m, int64_t b)
      : end(m.keys),
        lead(m.causal ? m.keys - m.queries + 1 : m.keys),
        mask(m.key_mask == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(m.key_mask + b * m.keys)) {
    if (m.key_lengths != nullptr) {
      const int64_t length = m.has_wide_lengths ? static_cast<const int64_t*>(m.key_lengths)[b]
                                                : static_cast<const int32_t*>(m.key_lengths)[b];
      end = static_cast<int>(length < 0 ? 0 : length < end ? length : end);
    }
  }

  // Query s sees no key from here on; all before, but for holes of the mask.
  MPLUG2_DEVICE int end_of(int s) const {
    const int last = s + lead < end ? s + lead : end;
    return last < 0 ? 0 : last;
  }
  // No query before this one sees key j.
  MPLUG2_DEVICE int first_query(int j) const { return j < lead ? 0 : j - lead + 1; }
  // Whether key j is seen by any query. The byte itself, not 0 or 1, so that a load may run ahead of its use.
  MPLUG2_DEVICE uint8_t byte(int j) const { return j >= end ? 0 : mask == nullptr ? 1 : mask[j]; }
  MPLUG2_DEVICE bool has(int j) const { return byte(j) != 0; }
  // The same of keys [first, first + 32), key first + i in bit i; asked by the whole warp.
  MPLUG2_DEVICE uint32_t word(int first) const {
    return __ballot_sync(0xffffffffu, has(first + static_cast<int>(threadIdx.x) % kWarp));
  }
};

// The first and the last query among the rows [first_row, end_row) of a group's G S, where row r is query r % S.
struct QuerySpan {
  int first, last;

  MPLUG2_DEVICE QuerySpan(int first_row, int end_row, int queries) {
    const int group_row = first_row < queries ? 0 : first_row / queries * queries;
    const bool one_group = end_row - group_row <= queries;
    first = one_group ? first_row - group_row : 0;
    last = one_group ? end_row - group_row - 1 : queries - 1;
  }
};

// Bits of the keys [first, first + 32) that lie before `end`.
MPLUG2_DEVICE uint32_t keys_before(int first, int end) {
  const int count = end - first;
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

}  // namespace mplug2::attention
