// The emulator under AddressSanitizer, without torch: `right` runs kernels that are right in every order and looks at
// their results, `load` and `cp.async` a kernel that reads beyond an allocation that way.
#include <cstdio>
#include <cstring>
#include <vector>

#include "launch.h"
#include "mutant.cuh"
#include "samples.cuh"

namespace {

using namespace mplug2;

template <class Number>
void allow_all(std::vector<Number>& numbers) {
  emulator::allow(numbers.data(), numbers.size() * sizeof(Number), true);
}

// Of one head, all numbers of V being 1: out is 1 everywhere, but for the rounding of the weights.
bool attention_is_right(mutant::Mutation mutation) {
  const int queries = 70, keys = 101;
  std::vector<bf16> q(queries * mutant::kHead), k(keys * mutant::kHead), v(k.size()), out(q.size());
  std::vector<float> total(mutant::kHead);
  for (size_t i = 0; i < q.size(); ++i) q[i] = from_float<bf16>(static_cast<float>(i % 7) - 3);
  for (size_t i = 0; i < k.size(); ++i) k[i] = from_float<bf16>(static_cast<float>(i % 5) - 2);
  for (bf16& x : v) x = from_float<bf16>(1);
  const emulator::Scope scope;
  for (auto* numbers : {&q, &k, &v, &out}) allow_all(*numbers);
  allow_all(total);
  const mutant::Params<bf16> p{q.data(), k.data(), v.data(), out.data(), total.data(), queries, keys, 0.18f, mutation};
  emulator::launch("mutant", dim3(2), mutant::kThreads, mutant::kSharedBytes,
                   [p] { mutant::attention_kernel<bf16>(p); });
  for (const bf16 x : out)
    if (!(std::fabs(to_float(x) - 1) < 0.02f)) return false;
  return std::fabs(total[0] - queries) < 0.02f * queries;
}

void read_past_the_end() {
  std::vector<float> x(64), y(64);
  const samples::Params p{x.data(), y.data(), 64};
  emulator::launch("read_past_the_end", dim3(1), 64, 0, [p] { samples::read_past_the_end(p); });
}

// An error leaves fibers behind; the next launch runs on their stacks.
bool goes_on_after_an_error() {
  bool is_thrown = false;
  try {
    attention_is_right(mutant::Mutation::kWrongCount);
  } catch (const std::exception& error) {
    is_thrown = std::strstr(error.what(), "others at this barrier") != nullptr;
  }
  return is_thrown && attention_is_right(mutant::Mutation::kNone);
}

}  // namespace

int main(int count, char** arguments) {
  const char* what = count > 1 ? arguments[1] : "";
  emulator::tracking().is_on = false;  // the compiler reports accesses to AddressSanitizer here
  if (std::strcmp(what, "right") != 0) {
    if (std::strcmp(what, "load") == 0) read_past_the_end();
    if (std::strcmp(what, "cp.async") == 0) attention_is_right(mutant::Mutation::kPastTheEnd);
    return 0;
  }
  using emulator::Order;
  for (const Order order : {Order::kPlain, Order::kSkewed, Order::kRandom})
    for (uint64_t seed = 0; seed < 3; ++seed) {
      emulator::schedule() = {order, seed};
      if (!attention_is_right(mutant::Mutation::kNone)) return 1;
    }
  if (!goes_on_after_an_error()) return 2;
  std::puts("right");
  return 0;
}
