// Activations and their slopes on a GPU, in float32, by its exponential. Safe at both infinities: the limits hold, and
// only NaN gives NaN.
#pragma once
#include "core/device.h"

namespace mplug2 {

MPLUG2_DEVICE float clamp(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }  // NaN stays
MPLUG2_DEVICE float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }
// Two instructions. The quotient is 0 where the exponential is beyond 2^126, as it should be.
MPLUG2_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp_approx(-x)); }

struct Identity {
  static constexpr bool kIsIdentity = true;
  MPLUG2_DEVICE static float value(float x) { return x; }
  MPLUG2_DEVICE static float slope(float) { return 1.0f; }
};

// x sigmoid(1.702 x)
struct QuickGelu {
  static constexpr bool kIsIdentity = false;
  MPLUG2_DEVICE static float value(float x) {
    const float y = x * sigmoid(1.702f * x);
    return x < -60.0f ? 0.0f : y;  // not -infinity times 0
  }
  MPLUG2_DEVICE static float slope(float x) { return both(x).slope; }
  struct Both {
    float value, slope;
  };
  // By one exponential.
  MPLUG2_DEVICE static Both both(float x) {
    const float bounded = clamp(x, 60.0f);  // constant beyond; not infinity times 0
    const float s = sigmoid(1.702f * bounded);
    return {x < -60.0f ? 0.0f : x * s, s * (1.0f + 1.702f * bounded * (1.0f - s))};
  }
};

// x Phi(x), the exact one.
struct Gelu {
  static constexpr bool kIsIdentity = false;
  MPLUG2_DEVICE static float value(float x) {
    const float y = 0.5f * x * (1.0f + erff(x * 0.70710678f));
    return x < -60.0f ? 0.0f : y;
  }
  MPLUG2_DEVICE static float slope(float x) {
    x = clamp(x, 60.0f);
    return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * 0.39894228f * exp_approx(-0.5f * x * x);
  }
};

}  // namespace mplug2
