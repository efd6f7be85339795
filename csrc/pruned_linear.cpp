#include "pruned_linear.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace finegates {
namespace {

// One K block of gathered rows: it stays in L2 (1 MB here) while panels stream past it.
constexpr int64_t kGatherBytes = 384 * 1024;
// Vectors of weight times rows (four at the least) below which a second thread, 2.5 us of waking
// and waiting, costs more than it brings: 8 us of work. The fuzz's small layers are for teams too.
#ifdef FINEGATES_STD_THREADS
constexpr int64_t kSerialWork = 600;
#else
constexpr int64_t kSerialWork = 60000;
#endif
constexpr int64_t kTasksPerThread = 4;
// Threads split the rows of x, so that each gathers only its own, where there are enough tiles to
// split evenly and so few panels that gathering all rows on each thread would be seen.
constexpr int64_t kTilesToSplit = 4;
constexpr int64_t kPanelsToShare = 32;
// Far above what memory holds, and far below what overflows where they are multiplied.
constexpr int64_t kMaxRows = int64_t{1} << 31;
constexpr int64_t kMaxStride = int64_t{1} << 40;

void check(const LinearArgs& args, const Packed& layer) {
  if (args.m < 0) throw std::invalid_argument("the number of rows of x is negative");
  if (args.in_features != layer.in_features) {
    throw std::invalid_argument("x has last dimension " + std::to_string(args.in_features) +
                                ", the packed layer takes " + std::to_string(layer.in_features));
  }
  if (args.out_features != layer.out_features) {
    throw std::invalid_argument("out_features is " + std::to_string(args.out_features) +
                                ", the packed layer makes " + std::to_string(layer.out_features));
  }
  int64_t bytes;
  if (args.m > kMaxRows || args.x_stride < args.in_features || args.x_stride > kMaxStride ||
      __builtin_mul_overflow(args.m, args.x_stride * 4, &bytes) ||
      __builtin_mul_overflow(args.m, args.out_features * 4, &bytes)) {
    throw std::invalid_argument("x has an impossible row stride or number of rows");
  }
  if (args.m > 0 && ((args.x == nullptr && args.in_features > 0) ||
                     (args.y == nullptr && args.out_features > 0))) {
    throw std::invalid_argument("x or y is null");
  }
}

using Job = LinearTasks::Job;

// More than kSerialWork rows are as good as that many, and can't overflow.
int64_t work_of(const Job& job, int64_t m) {
  const Packed& layer = job.call.layer;
  const int64_t units = divide_up(layer.columns, unit_length(layer.type));
  const int64_t rows = std::clamp<int64_t>(m, 4, kSerialWork);
  return layer.row_blocks * 2 * units * rows * (job.call.pair ? 2 : 1);
}

Job make_job(const LinearArgs& args, const Kernels& isa) {
  Job job = {};
  Call& call = job.call;
  call.layer = view(args.packed, args.packed_bytes);
  check(args, call.layer);
  call.pair = args.up != nullptr;
  if (call.pair) {
    call.up = view(args.up, args.up_bytes);
    if (call.up.type != call.layer.type) {
      throw std::invalid_argument("the two layers must have weights of the same type");
    }
    if (!same_columns(call.layer, call.up) || !same_rows(call.layer, call.up)) {
      throw std::invalid_argument("the two layers must keep the same rows and columns");
    }
  }
  const bool dot = args.type == Type::kBf16 && isa.has_dot;
  const int element = type_bytes(args.type);
  call.kind = call.layer.type == Type::kF32    ? Kind::kF32
              : call.layer.type == Type::kBf16 ? (dot ? Kind::kDot : Kind::kWide)
                                               : (dot ? Kind::kI8Dot : Kind::kI8);
  call.tune = tune();
  call.activation = args.activation;
  call.type = args.type;
  call.x = static_cast<const uint8_t*>(args.x);
  call.y = static_cast<uint8_t*>(args.y);
  call.residual = static_cast<const uint8_t*>(args.residual);
  call.x_stride = args.x_stride * element;
  call.y_stride = args.out_features * element;
  job.panels = call.layer.out_features == 0 || args.m == 0 ? 0 : call.layer.row_blocks;
  return job;
}

}  // namespace

LinearTasks::LinearTasks(const LinearArgs* args, int count) : count_(count) {
  if (count < 0 || count > kMaxLayers) {
    throw std::invalid_argument("at most 8 layers in one call, got " + std::to_string(count));
  }
  const Kernels& isa = kernels();
  for (int i = 0; i < count; ++i) {
    Job& job = jobs_[i];
    job = make_job(args[i], isa);
    if (args[i].x != args[0].x || args[i].m != args[0].m || args[i].x_stride != args[0].x_stride ||
        args[i].type != args[0].type) {
      throw std::invalid_argument("the layers of one call must read the same x");
    }
    work_ += work_of(job, args[i].m);
    job.first_panel = panels_;
    panels_ += job.panels;
    job.gather = 0;
    while (!same_columns(jobs_[job.gather].call.layer, job.call.layer)) ++job.gather;
  }
  if (count > 0) blocks_.m = args[0].m;
}

int LinearTasks::threads() const { return work_ < kSerialWork ? 1 : max_threads(); }

void LinearTasks::cut(int threads) {
  if (panels_ == 0) return;
  const Kernels& isa = kernels();
  int64_t tile_rows = 1, most_rows = kGatherBytes;
  for (int i = 0; i < count_; ++i) {
    const Kind kind = jobs_[i].call.kind;
    tile_rows = std::max<int64_t>(tile_rows, isa.tile_rows[static_cast<int>(kind)]);
    most_rows = std::min<int64_t>(most_rows, kGatherBytes / row_stride(kind));
  }
  Blocks& b = blocks_;
  b.count = divide_up(b.m, most_rows);
  if (divide_up(b.m, tile_rows) >= threads * kTilesToSplit && panels_ < threads * kPanelsToShare) {
    b.count = divide_up(b.count, threads) * threads;
  }
  const int64_t rows = b.most_rows();
  for (int i = 0; i < count_; ++i) {
    const Call& call = jobs_[i].call;
    gathered_bytes_ =
        std::max<size_t>(gathered_bytes_, call.layer.column_blocks * block_bytes(call.kind, rows));
    result_bytes_ =
        std::max<size_t>(result_bytes_, result_floats(rows) * (call.pair ? 2 : 1) * sizeof(float));
  }
  total_ = b.count * panels_;
  const int64_t n = std::min<int64_t>({threads, total_, kMaxShares});
  for (int64_t i = 0; i < n; ++i) {
    shares_[i].next = total_ * i / n;
    shares_[i].end = total_ * (i + 1) / n;
  }
  shares_count_ = n;
  step_ = n == 1 ? total_
                 : divide_up(divide_up(total_, threads * kTasksPerThread), kMaxSpan) * kMaxSpan;
}

void LinearTasks::run(uint8_t* scratch) {
  if (total_ == 0) return;
  Worker worker{scratch, reinterpret_cast<float*>(scratch + gathered_bytes_)};
  const int64_t own = arrived_.fetch_add(1);
  for (int64_t i = 0; i < shares_count_; ++i) {
    Share& share = shares_[(own + i) % shares_count_];
    for (int64_t first; (first = share.next.fetch_add(step_)) < share.end;) {
      multiply(first, std::min(first + step_, share.end), worker);
    }
  }
}

// Panels first to last (exclusive), counted through all blocks and jobs.
void LinearTasks::multiply(int64_t first, int64_t last, Worker& worker) const {
  const Kernels& isa = kernels();
  while (first < last) {
    const int64_t block = first / panels_, panel = first % panels_;
    int at = count_ - 1;
    while (panel < jobs_[at].first_panel) --at;
    const Job& job = jobs_[at];
    const int64_t first_row = blocks_.first_row(block);
    const int64_t rows = blocks_.first_row(block + 1) - first_row;
    if (worker.job != job.gather || worker.block != block) {
      isa.gather(job.call, first_row, rows, worker.gathered);
      worker.job = job.gather;
      worker.block = block;
    }
    const int64_t own = panel - job.first_panel;
    const int64_t end = std::min(own + last - first, job.panels);
    isa.multiply(job.call, first_row, rows, own, end, worker.gathered, worker.results);
    first += end - own;
  }
}

void pruned_linears(const LinearArgs* args, int count) {
  LinearTasks tasks(args, count);
  const int threads = tasks.threads();
  tasks.cut(threads);
  if (tasks.count() == 0) return;
  std::atomic<bool> out_of_memory{false};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks.count())), [&] {
    uint8_t* const scratch = thread_scratch(tasks.scratch_bytes());
    if (scratch == nullptr) {
      out_of_memory = true;
    } else {
      tasks.run(scratch);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

void pruned_linear(const LinearArgs& args) { pruned_linears(&args, 1); }

}  // namespace finegates
