// A kernel instance is the unit of trust: it serves where it was proven (mplug2 doctor), for this text of its source.
#pragma once
#include "core/launch.h"

// The digest of an op's sources, by the stem of the unit that launches them (<stem>_cuda.cu).
#define MPLUG2_DIGEST(op) mplug2::digest_of(#op)

namespace mplug2 {

// SHA-256 in hexadecimal, written by the build (build_tools/digests.py); "emulated" in the emulated library.
const char* digest_of(const char* op);

// A constant at namespace scope, which enters itself into the list of all instances while the library loads.
class Instance {
 public:
  Instance(const char* op, const char* name, const char* digest);
  // Whether it runs on this device: proven there and preferred there by the static rule, or forced by a layer. Asked
  // once per op, last of all conditions: it counts how often an instance served, and says what lacks proof.
  bool serves(const Device& device) const;

  struct Entry;

 private:
  Entry* entry_;
};

// An instance for each dtype that has kernels.
struct Instances {
  Instance bf16_instance, fp16_instance;
  bool serve(const Device& device, ScalarType dtype) const {
    if (dtype == ScalarType::BFloat16) return bf16_instance.serves(device);
    return dtype == ScalarType::Half && fp16_instance.serves(device);
  }
};

}  // namespace mplug2
