// The storage of a bfloat16 number: the upper half of a float32. Arithmetic on it is done in float32 (core/vec.h).
#pragma once
#include <cstdint>

namespace mplug2 {

struct Bf16 {
  uint16_t bits;
};

}  // namespace mplug2
