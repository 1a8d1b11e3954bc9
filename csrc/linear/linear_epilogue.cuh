// What follows the product in linear's forward pass, in float32: pre = sum + bias, out = activation(pre) + residual.
// Shared by the pass over a finished product and the product's own epilogue.
#pragma once
#include "core/activation.cuh"

namespace mplug2::linear {

MPLUG2_DEVICE float add_bias(float sum, float bias) { return sum + bias; }

template <class Activation>
MPLUG2_DEVICE float finish(float pre, float residual) {
  return Activation::value(pre) + residual;
}

}  // namespace mplug2::linear
