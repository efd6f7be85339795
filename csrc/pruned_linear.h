// y = act(x[:, columns] w^T + bias) scattered into the kept rows, plus residual.
#pragma once

#include "kernels.h"

namespace finegates {

struct LinearArgs {
  const void* packed;
  size_t packed_bytes;
  const void* x;  // [m, in_features], rows x_stride elements apart
  int64_t m;
  int64_t in_features;
  int64_t x_stride;
  Type type;  // of x, residual and y
  void* y;    // [m, out_features], contiguous
  int64_t out_features;
  const void* residual;  // null or like y
  Activation activation;
};

// Throws std::invalid_argument for arguments that do not fit the packed layer and std::bad_alloc
// when there is no room for the gathered rows (a few hundred KB a thread, kept for later calls).
void pruned_linear(const LinearArgs& args);

}  // namespace finegates
