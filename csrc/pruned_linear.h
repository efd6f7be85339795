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
// the same columns. Throws for layers that read different ones.
void pruned_linears(const LinearArgs* args, int count);

// The same for threads that already run: each of them calls run(), which returns when no task is
// left. Construction throws as above; nothing after it does.
class LinearTasks {
 public:
  static constexpr int kMaxLayers = 8;

  // One layer of a call.
  struct Job {
    Call call;
    int gather;           // the first job whose gathered rows serve this one too
    int64_t panels;       // 0 if there is nothing to write
    int64_t first_panel;  // of the panels of all jobs, counted through
  };

  // The rows of x in equal blocks, each gathered by the thread that works on it.
  struct Blocks {
    int64_t m;
    int64_t count;

    int64_t first_row(int64_t block) const { return m * block / count; }
    int64_t most_rows() const { return divide_up(m, count); }
  };

  LinearTasks(const LinearArgs* args, int count);

  // How many threads the work is worth.
  int threads() const;
  // Once, before run(): shares the work out over this many threads.
  void cut(int threads);
  int64_t count() const { return total_; }
  size_t scratch_bytes() const { return gathered_bytes_ + result_bytes_; }
  void run(uint8_t* scratch);

 private:
  static constexpr int kMaxShares = 16;

  // Panels of all blocks, counted through, that one thread begins with. The others help with what
  // is left once theirs are done, so that a thread which the machine slows down does fewer.
  struct alignas(kAlign) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // What a thread has gathered last, and where it works.
  struct Worker {
    uint8_t* gathered;
    float* results;
    int job = -1;
    int64_t block = -1;
  };

  void multiply(int64_t first, int64_t last, Worker& worker) const;

  Job jobs_[kMaxLayers];
  int count_;
  int64_t work_ = 0;
  int64_t panels_ = 0;  // of all jobs, for one block of rows
  int64_t total_ = 0;   // the same for all blocks
  int64_t step_ = 1;    // panels taken at once
  int64_t shares_count_ = 1;
  Blocks blocks_{};
  size_t gathered_bytes_ = 0, result_bytes_ = 0;
  std::atomic<int64_t> arrived_{0};
  Share shares_[kMaxShares];
};

}  // namespace finegates
