#include "pruned_linear.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"

namespace finegates {
namespace {

// One K block of gathered rows: it stays in L2 (1 MB here) while panels stream past it.
constexpr int64_t kGatherBytes = 384 * 1024;
// Vector multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = 40000;
constexpr int64_t kTasksPerThread = 4;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// One per thread, grown when needed and kept: a fresh half megabyte costs 128 page faults a call.
class Scratch {
 public:
  // Null when there is no memory.
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
      if (memory_) size_ = bytes;
    }
    return static_cast<uint8_t*>(memory_.get());
  }

 private:
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

thread_local Scratch scratch;

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

// How a call is cut: blocks of rows, each gathered once, times groups of panels.
struct Plan {
  int64_t tiles;  // of rows, over all blocks
  int64_t blocks;
  int64_t groups;
  int64_t group_panels;
  int64_t rows;  // of the largest block
  int threads;
};

Plan make_plan(const Packed& layer, Kind kind, int64_t m, const Kernels& isa) {
  const int64_t tile_rows = isa.tile_rows[static_cast<int>(kind)];
  const int64_t most = kGatherBytes / row_stride(kind) / tile_rows;
  Plan plan;
  plan.tiles = divide_up(m, tile_rows);
  plan.blocks = divide_up(plan.tiles, most);
  plan.rows = divide_up(plan.tiles, plan.blocks) * tile_rows;
  const int64_t work = layer.row_blocks * 2 * layer.columns * std::max<int64_t>(m, 4);
  plan.threads = work < kSerialWork ? 1 : max_threads();
  const int64_t wanted = plan.threads == 1 ? 1 : plan.threads * kTasksPerThread;
  const int64_t per_block = std::min(divide_up(wanted, plan.blocks), layer.row_blocks);
  plan.group_panels = divide_up(divide_up(layer.row_blocks, per_block), kMaxSpan) * kMaxSpan;
  if (plan.threads == 1) plan.group_panels = layer.row_blocks;
  plan.groups = divide_up(layer.row_blocks, plan.group_panels);
  plan.threads = static_cast<int>(std::min<int64_t>(plan.threads, plan.blocks * plan.groups));
  return plan;
}

}  // namespace

void pruned_linear(const LinearArgs& args) {
  const Packed layer = view(args.packed, args.packed_bytes);
  check(args, layer);
  if (args.m == 0 || args.out_features == 0) return;
  const Kernels& isa = kernels();
  const bool dot = layer.type == Type::kBf16 && args.type == Type::kBf16 && isa.has_dot;
  const Kind kind = layer.type == Type::kF32 ? Kind::kF32 : dot ? Kind::kDot : Kind::kWide;
  const int element = type_bytes(args.type);
  const Call call = {layer,
                     kind,
                     args.activation,
                     args.type,
                     static_cast<const uint8_t*>(args.x),
                     static_cast<uint8_t*>(args.y),
                     static_cast<const uint8_t*>(args.residual),
                     args.x_stride * element,
                     args.out_features * element};
  const Plan plan = make_plan(layer, kind, args.m, isa);
  const size_t gathered_bytes = layer.column_blocks * block_bytes(kind, plan.rows);
  const size_t result_bytes = (plan.rows * kPanel * kMaxSpan + kChunk) * sizeof(float);
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  // Tasks are taken one by one: a thread that the machine slows down takes fewer.
  parallel(plan.threads, [&] {
    uint8_t* gathered = scratch.get(gathered_bytes + result_bytes);
    if (gathered == nullptr) {
      out_of_memory = true;
      return;
    }
    float* results = reinterpret_cast<float*>(gathered + gathered_bytes);
    int64_t ready = -1;
    for (int64_t task; (task = next.fetch_add(1)) < plan.blocks * plan.groups;) {
      const int64_t block = task / plan.groups, group = task % plan.groups;
      const int64_t first_row = args.m * (plan.tiles * block / plan.blocks) / plan.tiles;
      const int64_t last_row = args.m * (plan.tiles * (block + 1) / plan.blocks) / plan.tiles;
      const int64_t rows = last_row - first_row;
      if (ready != block) isa.gather(call, first_row, rows, gathered);
      ready = block;
      const int64_t first_panel = group * plan.group_panels;
      isa.multiply(call, first_row, rows, first_panel,
                   std::min(first_panel + plan.group_panels, layer.row_blocks), gathered, results);
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace finegates
