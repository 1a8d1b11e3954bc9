// Turns addresses of the code in error messages into lines of the source, by addr2line and the line tables (-g1).
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "block.h"

namespace emulator {
namespace {

// Where a kernel's own text ends: the layers between it and the emulator.
bool is_kernel(const std::string& line) {
  for (const char* file : {"/device.h:", "/emulator.h:", "/launch.h:"})
    if (line.find(file) != std::string::npos) return false;
  return true;
}

// "file.cuh:12" or, where it cannot be told, nothing. Of inlined functions the innermost one of a kernel.
std::string line_of(uintptr_t pc) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(pc), &info) == 0 || info.dli_fname == nullptr) return "";
  char command[4096];
  // The call's own instruction lies before the address it returns to.
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(pc - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase)));
  FILE* const pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  std::string found;
  char line[4096];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) {
    const std::string text(line, std::strcspn(line, " \n"));
    if (text.find('?') != std::string::npos || !(found.empty() || !is_kernel(found))) continue;
    found = text;
  }
  pclose(pipe);
  return found.substr(found.rfind('/') + 1);
}

}  // namespace

std::string mark_line(uintptr_t pc) { return pc == 0 ? "" : '\x01' + std::to_string(pc) + '\x02'; }

std::string with_lines(const std::string& text) {
  std::string result;
  for (size_t at = 0; at < text.size();) {
    const size_t mark = text.find('\x01', at);
    result += text.substr(at, mark == std::string::npos ? mark : mark - at);
    if (mark == std::string::npos) break;
    const size_t end = text.find('\x02', mark);
    const std::string line = line_of(std::stoull(text.substr(mark + 1, end - mark - 1)));
    if (!line.empty()) result += " [" + line + "]";
    at = end + 1;
  }
  return result;
}

}  // namespace emulator
