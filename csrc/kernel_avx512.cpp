#include "kernel_avx512.h"

namespace finegates {
namespace {
using Vec = Avx512<false>;
}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kAvx512Kernels = make_kernels("avx512");
}  // namespace finegates
