#include "kernel_avx512.h"

namespace finegates {
namespace {
using Vec = Avx512<true>;
}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kAvx512Bf16Kernels = make_kernels("avx512bf16");
}  // namespace finegates
