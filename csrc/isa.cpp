// Compiled without ISA flags: nothing here may run an instruction the CPU lacks.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace finegates {
namespace {

struct Level {
  const char* name;
  const Kernels* kernels;  // null: not in this build
  bool (*supported)();
};

// __builtin_cpu_supports asks cpuid and, through xgetbv, whether the OS saves the registers.
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// VBMI and VBMI2 too: only Cooper Lake has the dot product without them.
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}
// AMD's family 25, by cpuid: older compilers have no name for it. Its Zen 3 has no AVX-512.
bool is_zen4() {
  unsigned a, b, c, d;
  return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) != 0 &&
         (a >> 8 & 15) + (a >> 20 & 255) == 25;
}
#endif
bool always() { return true; }

constexpr Level kLevels[] = {
    {"generic", &kGenericKernels, always},
#if defined(__x86_64__)
    {"avx2", &kAvx2Kernels, has_avx2},
    {"avx512", &kAvx512Kernels, has_avx512},
    {"avx512bf16", &kAvx512Bf16Kernels, has_avx512bf16},
#elif defined(__aarch64__)
    {"neon", &kNeonKernels, always},
#endif
};

const Kernels& choose() {
  const char* cap = std::getenv("FINEGATES_MAX_ISA");
  const bool capped = cap != nullptr && *cap != '\0';
  const Kernels* best = &kGenericKernels;
  bool known = !capped;
  for (const Level& level : kLevels) {
    if (level.supported()) best = level.kernels;
    if (capped && std::string(cap) == level.name) {
      known = true;
      break;
    }
  }
  if (!known) {
    std::string names;
    for (const Level& level : kLevels) names += std::string(names.empty() ? "" : ", ") + level.name;
    throw std::invalid_argument("FINEGATES_MAX_ISA must be one of " + names + ", got " + cap);
  }
  return *best;
}

Tune choose_tune() {
  const char* name = std::getenv("FINEGATES_TUNE");
  if (name == nullptr || *name == '\0') {
#if defined(__x86_64__)
    if (is_zen4()) return Tune::kZen4;
#endif
    return Tune::kZen5;
  }
  if (std::string(name) == "zen4") return Tune::kZen4;
  if (std::string(name) == "zen5") return Tune::kZen5;
  throw std::invalid_argument(std::string("FINEGATES_TUNE must be zen4 or zen5, got ") + name);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

Tune tune() {
  static const Tune chosen = choose_tune();
  return chosen;
}

}  // namespace finegates
