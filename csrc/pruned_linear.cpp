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
// and waiting, costs more than it brings: 8 us of work.
constexpr int64_t kSerialWork = 60000;
constexpr int64_t kTasksPerThread = 4;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

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
  if (args.x_stride < args.in_features ||
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

int64_t work_of(const Job& job) {
  const Packed& layer = job.call.layer;
  const int64_t units = divide_up(layer.columns, unit_length(layer.type));
  return layer.row_blocks * 2 * units * std::max<int64_t>(job.m, 4) * (job.call.pair ? 2 : 1);
}

Job make_job(const LinearArgs& args, const Kernels& isa) {
  Job job;
  Call& call = job.call;
  call.layer = view(args.packed, args.packed_bytes);
  check(args, call.layer);
  call.pair = args.up != nullptr;
  if (call.pair) {
    call.up = view(args.up, args.up_bytes);
    if (!same_columns(call.layer, call.up) || !same_rows(call.layer, call.up)) {
      throw std::invalid_argument("the two layers must keep the same rows and columns");
    }
  }
  const bool dot = args.type == Type::kBf16 && isa.has_dot;
  const int element = type_bytes(args.type);
  call.kind = call.layer.type == Type::kF32    ? Kind::kF32
              : call.layer.type == Type::kBf16 ? (dot ? Kind::kDot : Kind::kWide)
                                               : (dot ? Kind::kI8Dot : Kind::kI8);
  call.activation = args.activation;
  call.type = args.type;
  call.x = static_cast<const uint8_t*>(args.x);
  call.y = static_cast<uint8_t*>(args.y);
  call.residual = static_cast<const uint8_t*>(args.residual);
  call.x_stride = args.x_stride * element;
  call.y_stride = args.out_features * element;
  job.m = args.m;
  return job;
}

// Cuts the rows, then the panels: enough tasks that a slow thread may take fewer.
void cut(Job& job, int threads, const Kernels& isa) {
  const Packed& layer = job.call.layer;
  const int64_t tile_rows = isa.tile_rows[static_cast<int>(job.call.kind)];
  const int64_t most = kGatherBytes / row_stride(job.call.kind) / tile_rows;
  job.tiles = divide_up(job.m, tile_rows);
  job.blocks = divide_up(job.tiles, most);
  job.rows = divide_up(job.tiles, job.blocks) * tile_rows;
  job.group_panels = layer.row_blocks;
  if (threads > 1) {
    const int64_t wanted = divide_up(threads * kTasksPerThread, job.blocks);
    job.group_panels = divide_up(layer.row_blocks, std::min(wanted, layer.row_blocks));
    job.group_panels = divide_up(job.group_panels, kMaxSpan) * kMaxSpan;
  }
  job.groups = divide_up(layer.row_blocks, job.group_panels);
}

void run_task(const Job& job, int64_t task, bool gathered_already, const Kernels& isa,
              uint8_t* gathered, float* results) {
  const int64_t block = task / job.groups;
  const int64_t first_row = job.first_row(block);
  const int64_t rows = job.first_row(block + 1) - first_row;
  if (!gathered_already) isa.gather(job.call, first_row, rows, gathered);
  const int64_t first_panel = task % job.groups * job.group_panels;
  const int64_t last_panel = std::min(first_panel + job.group_panels, job.call.layer.row_blocks);
  isa.multiply(job.call, first_row, rows, first_panel, last_panel, gathered, results);
}

}  // namespace

LinearTasks::LinearTasks(const LinearArgs* args, int count) : count_(count) {
  if (count < 0 || count > kMaxLayers) throw std::invalid_argument("1 to 8 layers in one call");
  const Kernels& isa = kernels();
  for (int i = 0; i < count; ++i) {
    Job& job = jobs_[i];
    job = make_job(args[i], isa);
    work_ += work_of(job);
    job.gather = 0;
    while (!(args[job.gather].x == args[i].x && args[job.gather].m == args[i].m &&
             args[job.gather].x_stride == args[i].x_stride &&
             args[job.gather].type == args[i].type &&
             same_columns(jobs_[job.gather].call.layer, job.call.layer))) {
      ++job.gather;
    }
  }
}

int LinearTasks::threads() const { return work_ < kSerialWork ? 1 : max_threads(); }

void LinearTasks::cut(int threads) {
  const Kernels& isa = kernels();
  tasks_ = 0;
  for (int i = 0; i < count_; ++i) {
    Job& job = jobs_[i];
    job.first_task = tasks_;
    if (job.m == 0 || job.call.layer.out_features == 0) continue;
    finegates::cut(job, threads, isa);
    tasks_ += job.blocks * job.groups;
    gathered_bytes_ = std::max<size_t>(
        gathered_bytes_, job.call.layer.column_blocks * block_bytes(job.call.kind, job.rows));
    result_bytes_ = std::max<size_t>(
        result_bytes_, result_floats(job.rows) * (job.call.pair ? 2 : 1) * sizeof(float));
  }
}

void LinearTasks::run(uint8_t* scratch) {
  const Kernels& isa = kernels();
  float* const results = reinterpret_cast<float*>(scratch + gathered_bytes_);
  int64_t ready_gather = -1, ready_block = -1;
  int at = 0;
  for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) {
    while (at + 1 < count_ && task >= jobs_[at + 1].first_task) ++at;
    const Job& job = jobs_[at];
    const int64_t own = task - job.first_task, block = own / job.groups;
    const bool ready = ready_gather == job.gather && ready_block == block;
    run_task(job, own, ready, isa, scratch, results);
    ready_gather = job.gather;
    ready_block = block;
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
