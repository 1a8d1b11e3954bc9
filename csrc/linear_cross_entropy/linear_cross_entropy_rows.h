// linear_cross_entropy after the product, one row of logits at a time: the largest logit, then the sum of exponentials
// below it.
#include "core/vec.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace mplug2::MPLUG2_ISA {
namespace {

template <class T>
void linear_cross_entropy_fwd(const LinearCrossEntropyShape& shape, const T* logits, const int64_t* targets,
                              float* loss, float* lse, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* z = logits + row * shape.vocabulary;
    Vec tops = splat(-__builtin_inff()), totals{};
    for_lanes(shape.vocabulary, [&](int64_t i, auto lanes) {
      const Vec v = load(z + i, lanes);
      tops = larger(keep(v, lanes, -__builtin_inff()), tops);
      totals += v;
    });
    const float top = largest(tops);
    Vec exps{};
    for_lanes(shape.vocabulary,
              [&](int64_t i, auto lanes) { exps += keep(exp(load(z + i, lanes) - top), lanes, 0.0f); });
    const float log_sum = __builtin_logf(sum(exps));  // of exponentials below the largest logit
    lse[row] = top + log_sum;
    if (targets[row] == shape.ignore_index) {
      loss[row] = 0.0f;
      continue;
    }
    // Differences of logits, not of lse: nothing is lost where logits are large.
    const float target = load(z + targets[row], Part{1})[0], a = shape.label_smoothing;
    loss[row] = log_sum + (1.0f - a) * (top - target);
    if (a != 0.0f) loss[row] += a * (top - sum(totals) / shape.vocabulary);
  }
}

template <class T>
void linear_cross_entropy_bwd(const LinearCrossEntropyShape& shape, T* logits, const int64_t* targets,
                              const float* dloss, const float* lse, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    T* z = logits + row * shape.vocabulary;
    if (targets[row] == shape.ignore_index) {
      std::memset(z, 0, shape.vocabulary * sizeof(T));
      continue;
    }
    const float a = shape.label_smoothing, uniform = a / shape.vocabulary, scale = dloss[row];
    const Vec at_target = exp(load(z + targets[row], Part{1}) - lse[row]) - uniform - (1.0f - a);
    for_lanes(shape.vocabulary, [&](int64_t i, auto lanes) {
      store(z + i, scale * (exp(load(z + i, lanes) - lse[row]) - uniform), lanes);
    });
    store(z + targets[row], scale * at_target, Part{1});
  }
}

}  // namespace

template <class T>
LinearCrossEntropyKernels<T> linear_cross_entropy_kernels() {
  return {linear_cross_entropy_fwd<T>, linear_cross_entropy_bwd<T>};
}
template LinearCrossEntropyKernels<float> linear_cross_entropy_kernels();
template LinearCrossEntropyKernels<Bf16> linear_cross_entropy_kernels();

}  // namespace mplug2::MPLUG2_ISA
