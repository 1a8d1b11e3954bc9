// Calls of other ops by name, through PyTorch's dispatcher: ATen's products, and the references implemented in Python.
// NOTE: the text of an error raised inside is lost on the way, so arguments are checked before the call.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace mplug2 {

using torch::stable::Tensor;

template <class Result>
struct Results {
  static constexpr size_t count = 1;
  static Result take(StableIValue* stack) { return torch::stable::detail::to<Result>(stack[0]); }
};
template <>
struct Results<void> {
  static constexpr size_t count = 0;
  static void take(StableIValue*) {}
};
template <class... Ts>
struct Results<std::tuple<Ts...>> {
  static constexpr size_t count = sizeof...(Ts);
  static std::tuple<Ts...> take(StableIValue* stack) { return take(stack, std::index_sequence_for<Ts...>{}); }
  template <size_t... I>
  static std::tuple<Ts...> take(StableIValue* stack, std::index_sequence<I...>) {
    return {torch::stable::detail::to<Ts>(stack[I])...};
  }
};

// call<Result>("aten::mm", "", a, b). Arguments have exactly the types of the schema: int64_t, double, bool, Tensor,
// ...
template <class Result, class... Args>
Result call(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args), Results<Result>::count)> stack{
      torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return Results<Result>::take(stack.data());
}

inline Tensor to_dtype(const Tensor& t, torch::headeronly::ScalarType dtype) {
  if (t.scalar_type() == dtype) return t;
  return call<Tensor>("aten::to", "dtype", t, dtype, false, false, std::optional<torch::headeronly::MemoryFormat>{});
}

// a (M, K) b (K, N); a transposed view is no copy.
inline Tensor product(const Tensor& a, const Tensor& b) { return call<Tensor>("aten::mm", "", a, b); }
// The sum over the rows of a matrix, in the dtype asked for.
inline Tensor sum_rows(const Tensor& t, torch::headeronly::ScalarType dtype) {
  return call<Tensor>("aten::sum", "dim_IntList", t, std::make_optional(std::vector<int64_t>{0}), false,
                      std::make_optional(dtype));
}
inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out (M, N) = x (M, K) weight (N, K)^T + bias, written in place.
inline void linear_into(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  call<Tensor>("aten::linear", "out", x, weight, bias, out);
}

}  // namespace mplug2
