// The list of kernel instances, what is proven of them, and the choice of the layer. Records come from Python, which
// reads them once (mplug2/_library.py); the table is closed when the first kernel is asked for.
#include <algorithm>
#include <atomic>
#include <deque>
#include <sstream>
#include <string>
#include <vector>

#include "core/dispatcher.h"
#include "core/instance.h"

#if defined(__CUDACC__)
#define MPLUG2_TRUST mplug2_cuda
constexpr const char* kWarnUnproven = "mplug2_cuda::warn_unproven";
#else
#define MPLUG2_TRUST mplug2_emulated_cuda
constexpr const char* kWarnUnproven = "mplug2_emulated_cuda::warn_unproven";
#endif

namespace mplug2 {

struct Instance::Entry {
  std::string op, name, digest;
  std::vector<int> proven;          // capabilities
  std::atomic<int64_t> served = 0;  // times it was chosen
};

namespace {

constexpr int kMinCapability = 80;  // cp.async, and mma.sync of bfloat16

// The static rule. Correct is not yet faster: an instance named here leaves that capability to the reference although
// it is proven, because the reference was measured to be faster there (numbers in docs/gpu.md).
struct Slower {
  std::string name;
  int capability;
};
const std::vector<Slower>& slower() {
  static const std::vector<Slower> rule = {
      {"attention_fwd_many_bf16", 90}, {"attention_fwd_many_fp16", 90}, {"attention_bwd_many_bf16", 90},
      {"attention_bwd_many_fp16", 90}, {"attention_bwd_few_bf16", 90},  {"attention_bwd_few_fp16", 90},
  };
  return rule;
}

std::deque<Instance::Entry>& entries() {
  static std::deque<Instance::Entry> all;  // its elements never move
  return all;
}

enum class Layer { kProven, kPortable, kReference };

// In the emulated library nothing needs proof unless a test asks for it.
#if defined(__CUDACC__)
constexpr Layer kUsual = Layer::kProven;
#else
constexpr Layer kUsual = Layer::kPortable;
#endif

std::atomic<Layer> layer_in_use{kUsual};
std::atomic<bool> is_closed{false}, has_warned{false};

bool is_preferred(const std::string& name, int capability) {
  for (const Slower& s : slower())
    if (s.name == name && s.capability == capability) return false;
  return true;
}

bool is_proven(const Instance::Entry& entry, int capability) {
  if (std::find(entry.proven.begin(), entry.proven.end(), capability) != entry.proven.end()) return true;
  if (!has_warned.exchange(true))  // once a process; defined here, implemented in Python
    call<void>(kWarnUnproven, "", entry.name, static_cast<int64_t>(capability));
  return false;
}

std::string joined(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

// A line per instance, tabs between: op, name, digest, capabilities where it is proven, capabilities where it is slower
// than the reference, times it served.
std::string instances() {
  std::ostringstream lines;
  for (const Instance::Entry& entry : entries()) {
    std::vector<int> slower_on;
    for (const Slower& s : slower())
      if (s.name == entry.name) slower_on.push_back(s.capability);
    lines << entry.op << '\t' << entry.name << '\t' << entry.digest << '\t' << joined(entry.proven) << '\t'
          << joined(slower_on) << '\t' << entry.served << '\n';
  }
  return lines.str();
}

// Whether an instance whose name begins so might be chosen on a GPU of that capability, were it asked.
bool may_serve(std::string prefix, int64_t capability) {
  const Layer layer = layer_in_use;
  for (const Instance::Entry& entry : entries()) {
    if (entry.name.compare(0, prefix.size(), prefix) != 0) continue;
    const auto& proven = entry.proven;
    const bool is_proven_here = std::find(proven.begin(), proven.end(), capability) != proven.end();
    if (layer == Layer::kPortable || (layer == Layer::kProven && is_proven_here)) return true;
  }
  return false;
}

// What compiled the kernels; shown beside a record, no part of it.
std::string compiler() {
#if defined(__CUDACC__)
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
#else
  return "emulated";
#endif
}

// A record is "instance digest capability"; those of other sources are passed over.
void add_records(std::string records) {
  STD_TORCH_CHECK(!is_closed, "add_records: a kernel has been asked for already, so the table of proofs is closed");
  std::istringstream lines(records);
  std::string name, digest;
  int capability = 0;
  while (lines >> name >> digest >> capability)
    for (Instance::Entry& entry : entries())
      if (entry.name == name && entry.digest == digest) entry.proven.push_back(capability);
  STD_TORCH_CHECK(lines.eof() && !lines.bad(), "add_records: a record is \"instance digest capability\", got \"", name,
                  " ", digest, " ...\"");
}

// "reference", "portable", "proven", or "" for the usual choice. Of the whole process, for doctor, tests and
// benchmarks.
void force_layer(std::string name) {
  if (name.empty())
    layer_in_use = kUsual;
  else if (name == "proven")
    layer_in_use = Layer::kProven;
  else if (name == "portable")
    layer_in_use = Layer::kPortable;
  else if (name == "reference")
    layer_in_use = Layer::kReference;
  else
    STD_TORCH_CHECK(false, "layer: CUDA has no layer \"", name, "\", only \"reference\" and \"portable\"");
}

}  // namespace

Instance::Instance(const char* op, const char* name, const char* digest) : entry_(&entries().emplace_back()) {
  entry_->op = op;
  entry_->name = name;
  entry_->digest = digest;
}

bool Instance::serves(const Device& device) const {
  is_closed = true;
  const Layer layer = layer_in_use;
  if (layer == Layer::kReference) return false;
  const int capability = device.capability();
  const bool can = capability >= kMinCapability;
  STD_TORCH_CHECK(can || layer == Layer::kProven, entry_->op, ": layer \"portable\" needs compute capability 8.0, got ",
                  capability / 10, ".", capability % 10);
  if (!can) return false;
  if (layer == Layer::kProven && !(is_preferred(entry_->name, capability) && is_proven(*entry_, capability)))
    return false;
  ++entry_->served;
  return true;
}

#if !defined(__CUDACC__)
const char* digest_of(const char*) { return "emulated"; }
#endif

}  // namespace mplug2

STABLE_TORCH_LIBRARY(MPLUG2_TRUST, m) {
  m.def("instances() -> str");
  m.def("may_serve(str prefix, int capability) -> bool");
  m.def("compiler() -> str");
  m.def("add_records(str records) -> ()");
  m.def("force_layer(str name) -> ()");
  m.def("warn_unproven(str instance, int capability) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MPLUG2_TRUST, CompositeExplicitAutograd, m) {
  m.impl("instances", TORCH_BOX(&mplug2::instances));
  m.impl("may_serve", TORCH_BOX(&mplug2::may_serve));
  m.impl("compiler", TORCH_BOX(&mplug2::compiler));
  m.impl("add_records", TORCH_BOX(&mplug2::add_records));
  m.impl("force_layer", TORCH_BOX(&mplug2::force_layer));
}
