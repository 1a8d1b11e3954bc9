// linear_cross_entropy on the CPU: logits of a chunk of rows by ATen (oneDNN), reduced while they are near; the
// backward pass makes them again, turns them into their gradient in place, and multiplies. Logits of more than kChunk
// bytes never exist.
#define MPLUG2_ISA baseline
#include "core/cpu.h"
#include "core/rows.h"
#include "core/scratch.h"
#include "linear_cross_entropy/linear_cross_entropy_host.h"
#include "linear_cross_entropy/linear_cross_entropy_rows.h"

namespace mplug2 {
namespace {

constexpr int64_t kChunk = int64_t{32} << 20;

std::optional<Tensor> to_dtype(const std::optional<Tensor>& t, ScalarType dtype) {
  return t ? std::optional<Tensor>(mplug2::to_dtype(*t, dtype)) : t;
}

// f(first, count, logits) for chunks of rows; x, weight and bias are of one dtype, W's.
template <class W, class F>
void for_chunks(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, F f) {
  const int64_t rows = x.size(0), vocabulary = weight.size(0);
  const int64_t step = std::max<int64_t>(1, kChunk / static_cast<int64_t>(vocabulary * sizeof(W)));
  Scratch scratch(Scratch::bytes_of(std::min(step, rows), vocabulary, sizeof(W)));
  Tensor all = scratch.take(std::min(step, rows), vocabulary, Element<W>::dtype, sizeof(W)), x_rows = x;
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const Tensor logits = torch::stable::narrow(all, 0, 0, count);
    linear_into(torch::stable::narrow(x_rows, 0, first, count), weight, bias, logits);
    f(first, count, logits);
  }
}

template <class W>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                   const std::optional<Tensor>& bias, const LinearCrossEntropyShape& shape) {
  const auto kernels = MPLUG2_KERNELS(linear_cross_entropy_kernels<W>());
  const ScalarType dtype = Element<W>::dtype;
  Tensor loss = torch::stable::empty({x.size(0)}, ScalarType::Float), lse = torch::stable::empty_like(loss);
  for_chunks<W>(mplug2::to_dtype(x, dtype), mplug2::to_dtype(weight, dtype), to_dtype(bias, dtype),
                [&](int64_t first, int64_t count, const Tensor& logits) {
                  parallel_rows(count, shape.vocabulary, [&](int64_t begin, int64_t end) {
                    const int64_t row = first + begin;
                    kernels.fwd(shape, data<W>(logits) + begin * shape.vocabulary, data<int64_t>(targets) + row,
                                mutable_data<float>(loss) + row, mutable_data<float>(lse) + row, end - begin);
                  });
                });
  return {loss, lse};
}

template <class W>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dloss, const Tensor& x_, const Tensor& weight_,
                                            const Tensor& targets, const std::optional<Tensor>& bias, const Tensor& lse,
                                            const LinearCrossEntropyShape& shape) {
  const auto kernels = MPLUG2_KERNELS(linear_cross_entropy_kernels<W>());
  const ScalarType dtype = Element<W>::dtype, narrow = x_.scalar_type();
  Tensor x = mplug2::to_dtype(x_, dtype), weight = mplug2::to_dtype(weight_, dtype);
  Tensor dx = torch::stable::empty(x.sizes(), dtype);
  // Chunks are added up in float32.
  Tensor dweight = torch::stable::new_zeros(weight, weight.sizes(), ScalarType::Float);
  Tensor dbias = torch::stable::new_zeros(weight, {weight.size(0)}, ScalarType::Float);
  for_chunks<W>(x, weight, to_dtype(bias, dtype), [&](int64_t first, int64_t count, const Tensor& logits) {
    parallel_rows(count, shape.vocabulary, [&](int64_t begin, int64_t end) {
      const int64_t row = first + begin;
      kernels.bwd(shape, mutable_data<W>(logits) + begin * shape.vocabulary, data<int64_t>(targets) + row,
                  data<float>(dloss) + row, data<float>(lse) + row, end - begin);
    });
    call<Tensor>("aten::mm", "out", logits, weight, torch::stable::narrow(dx, 0, first, count));
    add_into(dweight, product(transposed(logits), torch::stable::narrow(x, 0, first, count)));
    add_into(dbias, sum_rows(logits, ScalarType::Float));
  });
  return {mplug2::to_dtype(dx, narrow), mplug2::to_dtype(dweight, narrow), mplug2::to_dtype(dbias, narrow)};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& x, const Tensor& weight, const Tensor& targets_,
                                                    std::optional<Tensor> bias, int64_t ignore_index,
                                                    double label_smoothing) {
  const LinearCrossEntropyShape shape =
      check_linear_cross_entropy(x, weight, targets_, bias, ignore_index, label_smoothing);
  const Tensor targets = torch::stable::contiguous(targets_);
  check_targets(targets, shape);
  if (!has_kernel(x) || x.numel() == 0 || weight.numel() == 0)
    return call<std::tuple<Tensor, Tensor>>("mplug2::linear_cross_entropy_fwd_reference", "", x, weight, targets, bias,
                                            ignore_index, label_smoothing);
  const bool narrow = x.scalar_type() == ScalarType::BFloat16 && has_bf16_products();
  return (narrow ? forward<Bf16> : forward<float>)(x, weight, targets, bias, shape);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& x, const Tensor& weight,
                                                            const Tensor& targets_, std::optional<Tensor> bias,
                                                            const Tensor& lse, int64_t ignore_index,
                                                            double label_smoothing) {
  const LinearCrossEntropyShape shape =
      check_linear_cross_entropy_bwd(dloss, x, weight, targets_, bias, lse, ignore_index, label_smoothing);
  const Tensor targets = torch::stable::contiguous(targets_);
  check_targets(targets, shape);
  if (!has_kernel(x) || x.numel() == 0 || weight.numel() == 0)
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::linear_cross_entropy_bwd_reference", "", dloss, x, weight,
                                                    targets, bias, lse, ignore_index, label_smoothing);
  const bool narrow = x.scalar_type() == ScalarType::BFloat16 && has_bf16_products();
  return (narrow ? backward<Bf16> : backward<float>)(as_float(dloss), x, weight, targets, bias, as_float(lse), shape);
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&mplug2::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&mplug2::linear_cross_entropy_bwd));
}
