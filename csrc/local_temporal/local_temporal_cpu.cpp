// local_temporal on the CPU: matrix products by ATen (oneDNN), one pass of our own before, between and after them,
// workspace reused. Videos are taken a few at a time, so that the workspace stays small and near.
#define MPLUG2_ISA baseline
#include "core/cpu.h"
#include "core/rows.h"
#include "core/scratch.h"
#include "local_temporal/local_temporal_host.h"
#include "local_temporal/local_temporal_rows.h"

namespace mplug2 {
namespace {

constexpr size_t kWorkspace = size_t{48} << 20;  // one 16-frame video of 257 tokens of width 1024 in float32

// conv_weight (D/2, 3) as three rows in float32, and its bias.
struct Convolution {
  Tensor taps, bias;
  Convolution(const Tensor& weight, const Tensor& conv_bias)
      : taps(as_float(transposed(weight))), bias(as_float(conv_bias)) {}
  TemporalTaps pointers() const {
    const float* first = data<float>(taps);
    const int64_t hidden = bias.size(0);
    return {{first, first + hidden, first + 2 * hidden}, data<float>(bias)};
  }
};

// Rows [first, last) of a tensor seen as a matrix of `width` columns.
Tensor rows(const Tensor& t, int64_t first, int64_t last, int64_t width) {
  Tensor matrix = torch::stable::view(t, {-1, width});
  return torch::stable::narrow(matrix, 0, first, last - first);
}

template <class T, class W>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const LocalTemporalWeights& w, const LocalTemporalShape& shape,
                                   bool return_hidden) {
  const auto kernels = MPLUG2_KERNELS(local_temporal_kernels<T, W>());
  const ScalarType dtype = Element<W>::dtype;
  const Tensor ln_weight = as_float(w.ln_weight), ln_bias = as_float(w.ln_bias);
  const Tensor down_weight = to_dtype(w.down_weight, dtype), down_bias = to_dtype(w.down_bias, dtype);
  const Tensor up_weight = to_dtype(w.up_weight, dtype), up_bias = to_dtype(w.up_bias, dtype);
  const Convolution conv(w.conv_weight, w.conv_bias);

  const int64_t videos = x.size(0), rows_per_video = shape.frames * shape.tokens;
  Tensor out = torch::stable::empty(x.sizes(), x.scalar_type());
  Tensor saved = torch::stable::empty({return_hidden ? videos * rows_per_video : 0, shape.hidden}, x.scalar_type());
  const size_t bytes_per_video = Scratch::bytes_of(rows_per_video, shape.width, sizeof(W)) +
                                 2 * Scratch::bytes_of(rows_per_video, shape.hidden, sizeof(W));
  const int64_t step = std::max<int64_t>(1, kWorkspace / bytes_per_video);
  Scratch scratch(std::min(step, videos) * (bytes_per_video + 3 * 64));
  const int64_t most = std::min(step, videos) * rows_per_video;
  const Tensor wide_all = scratch.take(most, shape.width, dtype, sizeof(W));
  const Tensor hidden_all = scratch.take(most, shape.hidden, dtype, sizeof(W));
  const Tensor act_all = scratch.take(most, shape.hidden, dtype, sizeof(W));

  for (int64_t video = 0; video < videos; video += step) {
    const int64_t first = video * rows_per_video, count = std::min(step, videos - video) * rows_per_video;
    const T* tokens = data<T>(x) + first * shape.width;
    T* result = mutable_data<T>(out) + first * shape.width;
    const bool in_place = std::is_same_v<T, W>;  // the last product can be made where its sum will stand
    const Tensor normed = rows(wide_all, 0, count, shape.width);
    const Tensor hidden = in_place && return_hidden ? rows(saved, first, first + count, shape.hidden)
                                                    : rows(hidden_all, 0, count, shape.hidden);
    const Tensor act = rows(act_all, 0, count, shape.hidden);
    const Tensor up = in_place ? rows(out, first, first + count, shape.width) : normed;

    parallel_rows(count, shape.width, [&](int64_t begin, int64_t end) {
      kernels.norm(shape, tokens, data<float>(ln_weight), data<float>(ln_bias), mutable_data<W>(normed), begin, end);
    });
    linear_into(normed, down_weight, down_bias, hidden);
    if (!in_place && return_hidden) {
      Tensor part = rows(saved, first, first + count, shape.hidden);
      torch::stable::copy_(part, hidden);
    }
    parallel_rows(count / shape.tokens, shape.tokens * shape.hidden, [&](int64_t begin, int64_t end) {
      kernels.mix(shape, data<W>(hidden), conv.pointers(), mutable_data<W>(act), begin, end);
    });
    linear_into(act, up_weight, up_bias, up);
    parallel_rows(count, shape.width,
                  [&](int64_t begin, int64_t end) { kernels.finish(shape, tokens, data<W>(up), result, begin, end); });
  }
  return {out, saved};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Floats of one part of the sums: 5 rows of hidden, 3 of width.
struct SumLayout {
  int64_t hidden, width;
  int64_t size() const { return 5 * hidden + 3 * width; }
  LocalTemporalSums at(float* start) const {
    float* wide = start + 5 * hidden;
    return {{start, start + hidden, start + 2 * hidden},
            start + 3 * hidden,
            start + 4 * hidden,
            wide,
            wide + width,
            wide + 2 * width};
  }
};

template <class T>
Gradients backward(const Tensor& dout, const Tensor& x, const Tensor& hidden, const LocalTemporalWeights& w,
                   const LocalTemporalShape& shape) {
  const auto forward_kernels = MPLUG2_KERNELS(local_temporal_kernels<T, T>());
  const auto kernels = MPLUG2_KERNELS(local_temporal_backward_kernels<T>());
  const Tensor ln_weight = as_float(w.ln_weight), ln_bias = as_float(w.ln_bias);
  const Convolution conv(w.conv_weight, w.conv_bias);
  const int64_t count = x.numel() / shape.width, num_frames = count / shape.tokens;
  const SumLayout layout{shape.hidden, shape.width};
  std::vector<float> sums(kParts * layout.size());

  const Tensor dout_rows = rows(dout, 0, count, shape.width);
  const Tensor dact = product(dout_rows, w.up_weight);  // becomes dmixed
  Tensor act = torch::stable::empty_like(dact);
  parallel_parts(num_frames, [&](int64_t part, int64_t first, int64_t last) {
    kernels.mix_bwd(shape, data<T>(hidden), conv.pointers(), mutable_data<T>(dact), mutable_data<T>(act),
                    layout.at(&sums[part * layout.size()]), first, last);
  });
  const Tensor dup_weight = product(transposed(dout_rows), act);
  const Tensor& dhidden = act;  // act is done with
  parallel_parts(num_frames, [&](int64_t part, int64_t first, int64_t last) {
    kernels.shift_bwd(shape, data<T>(dact), conv.pointers(), mutable_data<T>(dhidden),
                      layout.at(&sums[part * layout.size()]), first, last);
  });
  Tensor normed = torch::stable::empty({count, shape.width}, x.scalar_type());
  parallel_rows(count, shape.width, [&](int64_t first, int64_t last) {
    forward_kernels.norm(shape, data<T>(x), data<float>(ln_weight), data<float>(ln_bias), mutable_data<T>(normed),
                         first, last);
  });
  const Tensor ddown_weight = product(transposed(dhidden), normed);
  const Tensor dnormed = product(dhidden, w.down_weight);
  Tensor dx = torch::stable::empty(x.sizes(), x.scalar_type());
  parallel_parts(count, [&](int64_t part, int64_t first, int64_t last) {
    kernels.norm_bwd(shape, data<T>(dout), data<T>(dnormed), data<T>(x), data<float>(ln_weight), mutable_data<T>(dx),
                     layout.at(&sums[part * layout.size()]), first, last);
  });

  const Tensor total = sum_parts(sums, layout.size(), x.scalar_type());
  const auto piece = [&](int64_t start, int64_t size) {
    Tensor all = total;
    return torch::stable::clone(torch::stable::narrow(all, 0, start, size));
  };
  const int64_t n = shape.hidden, d = shape.width;
  const Tensor dtaps = torch::stable::view(piece(0, 3 * n), {3, n});
  return {dx,
          piece(5 * n, d),
          piece(5 * n + d, d),
          ddown_weight,
          piece(4 * n, n),
          torch::stable::contiguous(transposed(dtaps)),
          piece(3 * n, n),
          dup_weight,
          piece(5 * n + 2 * d, d)};
}

std::tuple<Tensor, Tensor> local_temporal_fwd(const Tensor& x, const Tensor& ln_weight, const Tensor& ln_bias,
                                              const Tensor& down_weight, const Tensor& down_bias,
                                              const Tensor& conv_weight, const Tensor& conv_bias,
                                              const Tensor& up_weight, const Tensor& up_bias, int64_t num_prefix_tokens,
                                              double eps, bool return_hidden) {
  const LocalTemporalWeights w{ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias};
  const LocalTemporalShape shape = check_local_temporal(x, w, num_prefix_tokens, eps);
  if (!has_kernel(x) || x.numel() == 0 || shape.hidden == 0)
    return call<std::tuple<Tensor, Tensor>>("mplug2::local_temporal_fwd_reference", "", x, ln_weight, ln_bias,
                                            down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias,
                                            num_prefix_tokens, eps, return_hidden);
  const auto run = x.scalar_type() == ScalarType::Float ? forward<float, float>
                   : has_bf16_products()                ? forward<Bf16, Bf16>
                                                        : forward<Bf16, float>;
  return run(torch::stable::contiguous(x), w, shape, return_hidden);
}

Gradients local_temporal_bwd(const Tensor& dout, const Tensor& x, const Tensor& hidden, const Tensor& ln_weight,
                             const Tensor& ln_bias, const Tensor& down_weight, const Tensor& down_bias,
                             const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& up_weight,
                             const Tensor& up_bias, int64_t num_prefix_tokens, double eps) {
  const LocalTemporalWeights w{ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias};
  const LocalTemporalShape shape = check_local_temporal_bwd(dout, x, hidden, w, num_prefix_tokens, eps);
  if (!has_kernel(x) || x.numel() == 0 || shape.hidden == 0)
    return call<Gradients>("mplug2::local_temporal_bwd_reference", "", dout, x, hidden, ln_weight, ln_bias, down_weight,
                           down_bias, conv_weight, conv_bias, up_weight, up_bias, num_prefix_tokens, eps);
  const Tensor dout_c = torch::stable::contiguous(dout), x_c = torch::stable::contiguous(x),
               hidden_c = torch::stable::contiguous(hidden);
  if (x.scalar_type() == ScalarType::Float) return backward<float>(dout_c, x_c, hidden_c, w, shape);
  if (has_bf16_products()) return backward<Bf16>(dout_c, x_c, hidden_c, w, shape);
  const auto wide = [](const Tensor& t) { return to_dtype(t, ScalarType::Float); };
  const LocalTemporalWeights wide_w{wide(ln_weight),   wide(ln_bias),   wide(down_weight), wide(down_bias),
                                    wide(conv_weight), wide(conv_bias), wide(up_weight),   wide(up_bias)};
  return std::apply([&](const auto&... gradient) { return Gradients{to_dtype(gradient, x.scalar_type())...}; },
                    backward<float>(wide(dout_c), wide(x_c), wide(hidden_c), wide_w, shape));
}

}  // namespace
}  // namespace mplug2

STABLE_TORCH_LIBRARY_IMPL(mplug2, CPU, m) {
  m.impl("local_temporal_fwd", TORCH_BOX(&mplug2::local_temporal_fwd));
  m.impl("local_temporal_bwd", TORCH_BOX(&mplug2::local_temporal_bwd));
}
