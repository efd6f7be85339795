// y = act(x[:, columns] w^T + bias) scattered into the kept rows, plus residual; or, for a pair of
// layers with the same kept rows and columns, act(gate(x)) * up(x) scattered.
#pragma once

#include <atomic>

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

// The same for threads that already run: each of them calls run(), which returns when no task is
// left. Construction throws as above; nothing after it does.
class LinearTasks {
 public:
  static constexpr int kMaxLayers = 8;

  // One layer of a call and how it is cut: blocks of rows, each gathered once, times groups of
  // panels.
  struct Job {
    Call call;
    int gather;  // the first job whose gathered rows serve this one too
    int64_t m;
    int64_t tiles;  // of rows, over all blocks
    int64_t blocks;
    int64_t rows;  // of the largest block
    int64_t groups;
    int64_t group_panels;
    int64_t first_task;

    int64_t first_row(int64_t block) const { return m * (tiles * block / blocks) / tiles; }
  };

  LinearTasks(const LinearArgs* args, int count);

  // How many threads the work is worth.
  int threads() const;
  // Once, before run(): cuts the work for this many threads.
  void cut(int threads);
  int64_t count() const { return tasks_; }
  size_t scratch_bytes() const { return gathered_bytes_ + result_bytes_; }
  void run(uint8_t* scratch);

 private:
  Job jobs_[kMaxLayers];
  int count_;
  int64_t work_ = 0;
  int64_t tasks_ = 0;
  size_t gathered_bytes_ = 0, result_bytes_ = 0;
  std::atomic<int64_t> next_{0};  // tasks are taken one by one: a slow thread takes fewer
};

}  // namespace finegates
