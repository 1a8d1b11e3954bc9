// linear_cross_entropy on a GPU: logits of a chunk by ATen (cuBLAS), then one pass over them. Forward takes chunks of
// rows. Backward takes chunks of the vocabulary, which lse makes possible: the gradients of weight and bias of a chunk
// are then complete at once, and only dx is added up, in float32. Workspace: a chunk of logits, beside it backward dx
// in float32, and for more rows than fit a chunk of 2,048 words the weight's gradient in float32. D that is no multiple
// of 8, float32 and float64: the reference.
#include "core/dispatcher.h"
#include "core/elementwise.h"
#include "linear_cross_entropy/linear_cross_entropy_bwd.cuh"
#include "linear_cross_entropy/linear_cross_entropy_fwd.cuh"
#include "linear_cross_entropy/linear_cross_entropy_host.h"

namespace mplug2 {
namespace {

using namespace linear_cross_entropy;

const Instances kFwd{{"linear_cross_entropy", "linear_cross_entropy_fwd_bf16", MPLUG2_DIGEST(linear_cross_entropy)},
                     {"linear_cross_entropy", "linear_cross_entropy_fwd_fp16", MPLUG2_DIGEST(linear_cross_entropy)}};
const Instances kBwd{{"linear_cross_entropy", "linear_cross_entropy_bwd_bf16", MPLUG2_DIGEST(linear_cross_entropy)},
                     {"linear_cross_entropy", "linear_cross_entropy_bwd_fp16", MPLUG2_DIGEST(linear_cross_entropy)}};

// Logits of a chunk, for each multiprocessor: 256 KB, so that a chunk stays in the second-level cache (27 of 40 MB on
// 8.0, 33 of 50 on 9.0) until the last product has read it.
constexpr int64_t kChunkLogits = 128 << 10;
constexpr int64_t kMinColumns = 2048;  // of a chunk backward: thinner products are slow
constexpr int64_t kTile = 128;         // rows or columns of a product's tile

bool has_cuda_kernel(const Tensor& x, const Tensor& weight) {
  return is_half(x) && x.numel() > 0 && weight.numel() > 0 && x.size(1) % kChunk == 0 && weight.size(0) <= kMaxColumns;
}

int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// `most` of `count` at a time, in whole tiles where there is more than one time.
int64_t step_of(int64_t count, int64_t most) {
  return count <= most ? count : std::max<int64_t>(kTile, most / kTile * kTile);
}

// bias at the beginning of `length` numbers, aligned: kernels read whole chunks of it.
std::optional<Tensor> padded(const std::optional<Tensor>& bias, int64_t length) {
  if (!bias) return bias;
  Tensor all = torch::stable::new_zeros(*bias, {length});
  Tensor own = torch::stable::narrow(all, 0, 0, bias->size(0));
  torch::stable::copy_(own, *bias);
  return all;
}

Tensor part(const Tensor& t, int64_t dim, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, dim, first, count);
}

// A matrix whose rows start at multiples of 16 bytes, seen as `rows` and `columns` of the buffer. NOTE: not a view of
// (rows, columns) packed: 30,522 words would leave three rows of four misaligned, for cuBLAS too.
Tensor logits_of(const Tensor& buffer, int64_t rows, int64_t columns) {
  const Tensor matrix = torch::stable::view(part(buffer, 0, 0, rows * round_up(columns, kChunk)), {rows, -1});
  return part(matrix, 1, 0, columns);
}

// out = a b, in place
void product_into(const Tensor& a, const Tensor& b, const Tensor& out) { call<Tensor>("aten::mm", "out", a, b, out); }

template <class T>
std::tuple<Tensor, Tensor> forward(const Device& device, const Tensor& x, const Tensor& weight, const Tensor& targets,
                                   const std::optional<Tensor>& bias_, const LinearCrossEntropyShape& shape) {
  const int64_t rows = x.size(0), stride = round_up(shape.vocabulary, kChunk);
  const int64_t step = step_of(rows, device.num_multiprocessors() * kChunkLogits / stride);
  const Tensor loss = torch::stable::new_empty(x, {rows}, ScalarType::Float), lse = torch::stable::empty_like(loss);
  const Tensor buffer = torch::stable::new_empty(x, {step * stride});
  const std::optional<Tensor> bias = padded(bias_, stride);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    product_into(part(x, 0, first, count), transposed(weight), logits_of(buffer, count, shape.vocabulary));
    launch(device, "linear_cross_entropy_fwd", fwd_kernel<T>, dim3(static_cast<unsigned>(count)), kFwdThreads,
           kFwdSharedBytes,
           FwdParams<T>{device_data<T>(buffer), bias ? device_data<T>(*bias) : nullptr,
                        device_data<int64_t>(targets) + first, mutable_device_data<float>(loss) + first,
                        mutable_device_data<float>(lse) + first, static_cast<int>(shape.vocabulary), stride,
                        shape.ignore_index, shape.label_smoothing});
  }
  return {loss, lse};
}

// a b in float32: parts of a sum are not rounded. ATen has this product on GPUs alone.
Tensor product_in_float(const Tensor& a, const Tensor& b) {
#if defined(__CUDACC__)
  return call<Tensor>("aten::mm", "dtype", a, b, ScalarType::Float);
#else
  return product(to_dtype(a, ScalarType::Float), to_dtype(b, ScalarType::Float));
#endif
}

// A gradient that is made of `times` products: written by the only one, or added up in float32.
class Gradient {
 public:
  Gradient(const Device& device, const Tensor& like, int64_t times)
      : device_(device),
        dtype_(like.scalar_type()),
        is_sum_(times > 1),
        total_(is_sum_ ? torch::stable::new_zeros(like, like.sizes(), ScalarType::Float)
                       : torch::stable::new_empty(like, like.sizes())) {}
  // Rows [first, first + count) += a b
  void add(int64_t first, int64_t count, const Tensor& a, const Tensor& b) const {
    const Tensor rows = part(total_, 0, first, count);
    if (!is_sum_) return product_into(a, b, rows);
    const Tensor values = product_in_float(a, b);
    const int64_t numbers = values.numel() / 4;
    launch(device_, "linear_cross_entropy_bwd_add", add_kernel,
           dim3(resident_blocks(device_, kAddBlocks, ceil_div(numbers, kAddThreads))), kAddThreads, 0,
           AddParams{device_data<float>(values), mutable_device_data<float>(rows), numbers});
  }
  Tensor result() const { return to_dtype(total_, dtype_); }

 private:
  const Device& device_;
  ScalarType dtype_;
  bool is_sum_;
  Tensor total_;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Device& device, const Tensor& dloss, const Tensor& x,
                                            const Tensor& weight, const Tensor& targets,
                                            const std::optional<Tensor>& bias_, const Tensor& lse,
                                            const LinearCrossEntropyShape& shape) {
  const int64_t rows = x.size(0), vocabulary = shape.vocabulary, chunk = device.num_multiprocessors() * kChunkLogits;
  const int64_t row_step = step_of(rows, std::max<int64_t>(1, chunk / std::min(vocabulary, kMinColumns)));
  const int64_t column_step = step_of(vocabulary, std::max<int64_t>(kTile, chunk / row_step));
  const int64_t row_times = ceil_div(rows, row_step), column_times = ceil_div(vocabulary, column_step);
  const Tensor buffer = torch::stable::new_empty(x, {row_step * round_up(column_step, kChunk)});
  const int64_t stride = round_up(vocabulary, kChunk);
  const std::optional<Tensor> bias = padded(bias_, stride);
  const Gradient dx(device, x, column_times), dweight(device, weight, row_times);

  const int64_t tiles = ceil_div(column_step, kWarpColumns);
  const int num_parts = static_cast<int>(
      std::max<int64_t>(1, resident_blocks(device, kBwdBlocks, tiles * ceil_div(row_step, kBwdRows)) / tiles));
  const Tensor parts = torch::stable::new_empty(x, {row_times * num_parts, 1, stride}, ScalarType::Float);

  for (int64_t row = 0; row < rows; row += row_step) {
    const int64_t count = std::min(row_step, rows - row);
    const Tensor x_rows = part(x, 0, row, count);
    for (int64_t column = 0; column < vocabulary; column += column_step) {
      const int64_t columns = std::min(column_step, vocabulary - column);
      const Tensor words = part(weight, 0, column, columns), logits = logits_of(buffer, count, columns);
      product_into(x_rows, transposed(words), logits);
      const BwdParams<T> params{mutable_device_data<T>(buffer),
                                bias ? device_data<T>(*bias) + column : nullptr,
                                device_data<int64_t>(targets) + row,
                                device_data<float>(dloss) + row,
                                device_data<float>(lse) + row,
                                mutable_device_data<float>(parts) + row / row_step * num_parts * stride + column,
                                count,
                                static_cast<int>(column),
                                static_cast<int>(columns),
                                round_up(columns, kChunk),
                                stride,
                                static_cast<int>(vocabulary),
                                shape.ignore_index,
                                shape.label_smoothing};
      launch(device, "linear_cross_entropy_bwd", bwd_kernel<T>,
             dim3(static_cast<unsigned>(ceil_div(columns, kWarpColumns)), num_parts), kBwdThreads,
             column_sum_shared_bytes(kBwdWarps), params);
      dx.add(row, count, logits, words);
      dweight.add(column, columns, transposed(logits), x_rows);
    }
  }
  const Tensor dbias = torch::stable::new_empty(weight, {stride});
  sum_parts<T, 1>(device, "linear_cross_entropy_bwd_parts", parts, {{mutable_device_data<T>(dbias), 1}});
  return {dx.result(), dweight.result(), part(dbias, 0, 0, vocabulary)};
}

std::tuple<Tensor, Tensor> linear_cross_entropy_fwd(const Tensor& x, const Tensor& weight, const Tensor& targets,
                                                    std::optional<Tensor> bias, int64_t ignore_index,
                                                    double label_smoothing) {
  const LinearCrossEntropyShape shape =
      check_linear_cross_entropy(x, weight, targets, bias, ignore_index, label_smoothing);
  const Device device(x);
  if (!has_cuda_kernel(x, weight) || !kFwd.serve(device, x.scalar_type()))
    return call<std::tuple<Tensor, Tensor>>("mplug2::linear_cross_entropy_fwd_reference", "", x, weight, targets, bias,
                                            ignore_index, label_smoothing);
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? forward<bf16> : forward<fp16>;
  return run(device, x, weight, torch::stable::contiguous(targets), bias, shape);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(const Tensor& dloss, const Tensor& x, const Tensor& weight,
                                                            const Tensor& targets, std::optional<Tensor> bias,
                                                            const Tensor& lse, int64_t ignore_index,
                                                            double label_smoothing) {
  const LinearCrossEntropyShape shape =
      check_linear_cross_entropy_bwd(dloss, x, weight, targets, bias, lse, ignore_index, label_smoothing);
  const Device device(x);
  if (!has_cuda_kernel(x, weight) || !kBwd.serve(device, x.scalar_type()))
    return call<std::tuple<Tensor, Tensor, Tensor>>("mplug2::linear_cross_entropy_bwd_reference", "", dloss, x, weight,
                                                    targets, bias, lse, ignore_index, label_smoothing);
  const auto as_float = [](const Tensor& t) { return torch::stable::contiguous(to_dtype(t, ScalarType::Float)); };
  const auto run = x.scalar_type() == ScalarType::BFloat16 ? backward<bf16> : backward<fp16>;
  return run(device, as_float(dloss), x, weight, torch::stable::contiguous(targets), bias, as_float(lse), shape);
}

}  // namespace
}  // namespace mplug2

MPLUG2_CUDA_LIBRARY(m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&mplug2::linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&mplug2::linear_cross_entropy_bwd));
}
