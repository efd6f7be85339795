// y = act(x[:, columns] w^T + bias) scattered into the kept rows, plus residual; or, for a pair of
// layers with the same kept rows and columns, act(gate(x)) * up(x) scattered.
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
  const void* up;  // null, or the second layer of a gated pair
  size_t up_bytes;
};

// Throws std::invalid_argument for arguments that do not fit the packed layer and std::bad_alloc
// when there is no room for the gathered rows (a few hundred KB a thread, kept for later calls).
void pruned_linear(const LinearArgs& args);

// Several layers of the same x at once: one parallel region, and one gather for layers that keep
// the same columns.
void pruned_linears(const LinearArgs* args, int count);

}  // namespace finegates
