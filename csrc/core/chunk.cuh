// Chunks of eight 16-bit numbers, what one thread moves in one 16-byte access, and float32 sums of them.
#pragma once
#include "core/device.h"

namespace mplug2 {

constexpr int kChunk = 8;  // numbers in 16 bytes

template <class T>
MPLUG2_DEVICE void unpack_chunk(uint4 chunk, float (&to)[kChunk]) {
  const uint32_t pairs[] = {chunk.x, chunk.y, chunk.z, chunk.w};
  MPLUG2_UNROLL
  for (int i = 0; i < kChunk / 2; ++i) {
    const float2 pair = unpack<T>(pairs[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}
template <class T>
MPLUG2_DEVICE uint4 pack_chunk(const float (&from)[kChunk]) {
  return make_uint4(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]), pack<T>(from[4], from[5]),
                    pack<T>(from[6], from[7]));
}
MPLUG2_DEVICE uint4 zero_chunk() { return make_uint4(0, 0, 0, 0); }

// Four float32 in one access.
MPLUG2_DEVICE void load_floats(float* to, const float* from) {
  const uint4 bits = load16(from);
  __builtin_memcpy(to, &bits, sizeof(bits));
}
MPLUG2_DEVICE void store_floats(float* to, const float* from) {
  uint4 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  store16(to, bits);
}
// Two float32 in one access.
MPLUG2_DEVICE void store_pair(float* to, float first, float second) {
  store8(to, make_uint2(__float_as_uint(first), __float_as_uint(second)));
}

}  // namespace mplug2
