// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this build and this processor share, and which one is in use.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>
#include <vector>

namespace minbert {
namespace {

using Choice = std::pair<const char*, Isa>;

std::vector<Choice> available() {
  std::vector<Choice> found{{"portable", Isa::portable}};
#ifdef MINBERT_HAS_AVX2
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return found;
  found.emplace_back("avx2", Isa::avx2);
#endif
#ifdef MINBERT_HAS_AVX512
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return found;
  found.emplace_back("avx512", Isa::avx512);
#endif
#ifdef MINBERT_HAS_AVX512BF16
  if (!__builtin_cpu_supports("avx512bf16")) return found;
  found.emplace_back("avx512bf16", Isa::avx512bf16);
#endif
  return found;
}

Isa named(const std::string& name) {
  for (const auto& [known, value] : available())
    if (name == known) return value;
  throw std::invalid_argument("no instruction set '" + name + "' here; this build and processor have: " + isa_names());
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = [] {
    const char* wish = std::getenv("MINBERT_FAST_ISA");
    return wish && *wish ? named(wish) : available().back().second;
  }();
  return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(named(name), std::memory_order_relaxed); }

std::string isa_name() {
  for (const auto& [name, value] : available())
    if (value == isa()) return name;
  return "portable";
}

std::string isa_names() {
  std::string names;
  for (const auto& [name, value] : available()) names += (names.empty() ? "" : " ") + std::string(name);
  return names;
}

}  // namespace minbert
