// Which instruction set serves this process.
#pragma once

#include "kernels.h"

namespace finegates {

// The best level that the build, the CPU, its operating system and FINEGATES_MAX_ISA (generic,
// avx2, avx512, avx512bf16, neon; read once) allow. Throws std::invalid_argument on an unknown
// level.
const Kernels& kernels();

// Which processor's measurements serve this process: FINEGATES_TUNE (zen4, zen5; read once), or
// those of the CPU itself, or Zen 5's. Results are the same. Throws std::invalid_argument on
// another name.
Tune tune();

}  // namespace finegates
