// The activations of linear on vectors.
#pragma once
#include "core/vec.h"
#include "linear/linear.h"

namespace mplug2::MPLUG2_ISA {
namespace {

// Calls f with the activation as a compile-time constant.
template <class F>
MPLUG2_INLINE void with_activation(Activation activation, F f) {
  if (activation == Activation::kGelu)
    f([](Vec x) { return gelu(x); }, [](Vec x) { return gelu_slope(x); });
  else if (activation == Activation::kQuickGelu)
    f([](Vec x) { return quick_gelu(x); }, [](Vec x) { return quick_gelu_slope(x); });
  else
    f([](Vec x) { return x; }, [](Vec) { return splat(1.0f); });
}

}  // namespace
}  // namespace mplug2::MPLUG2_ISA
