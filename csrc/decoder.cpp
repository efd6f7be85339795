#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "pruned_linear.h"
#include "scratch.h"

namespace finegates {
namespace {

constexpr int64_t kMaxSize = 1 << 24;   // of one dimension
constexpr int64_t kMaxInner = 1 << 30;  // as in layout.cpp
constexpr int64_t kNormRows = 16;       // rows of one norm task
constexpr int64_t kAttentionRows = 56;  // four tiles
// Up to this many rows a group's attention reads the cache as it is; packing it pays off later.
constexpr int64_t kFewRows = 16;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_pointers(const DecoderArgs& args) {
  const Attention& a = args.attention;
  bool missing = args.layers == nullptr || args.cache == nullptr || args.end_norm == nullptr ||
                 args.x == nullptr || args.y == nullptr || a.cos == nullptr || a.sin == nullptr ||
                 a.positions == nullptr;
  for (int64_t i = 0; i < args.count && !missing; ++i) {
    const DecoderLayer& layer = args.layers[i];
    missing = layer.attention_norm == nullptr || layer.mlp_norm == nullptr ||
              args.cache[2 * i] == nullptr || args.cache[2 * i + 1] == nullptr;
  }
  if (missing) fail("an operand of the decoder is null");
}

void check(const DecoderArgs& args) {
  const Attention& a = args.attention;
  for (const int64_t size :
       {args.count, args.hidden, a.batch, a.queries, a.heads, a.groups, a.capacity}) {
    if (size < 1 || size > kMaxSize) fail("a size of the decoder is outside [1, 2^24]");
  }
  if (a.head_dim < 2 || a.head_dim > kMaxHeadSize || a.head_dim % 2 != 0) {
    fail("head_dim must be even and at most " + std::to_string(kMaxHeadSize) + ", got " +
         std::to_string(a.head_dim));
  }
  if (a.heads % a.groups != 0) {
    fail("the number of key heads must divide the number of query heads, got " +
         std::to_string(a.groups) + " and " + std::to_string(a.heads));
  }
  if (a.past < 0 || a.past > a.capacity - a.queries) {
    fail("the cache has room for " + std::to_string(a.capacity) + " tokens, got " +
         std::to_string(a.past) + " and " + std::to_string(a.queries) + " new ones");
  }
  // The scratch holds eight results of each row, none wider than this, and panels of all tokens.
  const int64_t widest = std::max(kMaxInner, a.heads * a.head_dim);
  int64_t bytes;
  if (__builtin_mul_overflow(a.batch * a.queries, widest * 64, &bytes) ||
      __builtin_mul_overflow(a.batch * a.groups, (a.capacity + kPanel) * kMaxHeadSize * 16,
                             &bytes)) {
    fail("x or the cache has too many rows");
  }
  check_pointers(args);
  if (a.mask != nullptr && args.mask_tokens < a.tokens()) {
    fail("mask covers " + std::to_string(args.mask_tokens) + " tokens, not " +
         std::to_string(a.tokens()));
  }
  for (int64_t i = 0; i < a.batch * a.queries; ++i) {
    if (a.positions[i] < 0 || a.positions[i] >= args.rope_positions) {
      fail("positions must lie in [0, " + std::to_string(args.rope_positions) + "), got " +
           std::to_string(a.positions[i]));
    }
  }
}

// Tasks of one phase are taken one by one, as in LinearTasks.
class Counter {
 public:
  template <class Body>
  void run(int64_t tasks, const Body& body) {
    for (int64_t task; (task = next_.fetch_add(1)) < tasks;) body(task);
  }

 private:
  std::atomic<int64_t> next_{0};
};

// One layer's phases, in order; between two of them the threads wait for each other.
struct Phases {
  Phases(const LinearArgs (&qkv)[3], const LinearArgs& o, const LinearArgs& glu,
         const LinearArgs& down)
      : qkv(qkv, 3), o(&o, 1), glu(&glu, 1), down(&down, 1) {}
  Counter attention_norm;
  LinearTasks qkv;
  Counter append, attend;
  LinearTasks o;
  Counter mlp_norm;
  LinearTasks glu, down;
};

// Writes what each stage took, one after the other; nothing at all without room for it.
class StageClock {
 public:
  explicit StageClock(double* seconds) : at_(seconds) {
    if (at_ != nullptr) begin_ = Clock::now();
  }
  void lap() {
    if (at_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    *at_++ = std::chrono::duration<double>(now - begin_).count();
    begin_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* at_;
  Clock::time_point begin_;
};

// Where each intermediate result lies in the caller's scratch.
struct Workspace {
  uint8_t *normed, *q, *k, *v, *attended, *inner, *middle, *x, *panels;
};

class Decoder {
 public:
  explicit Decoder(const DecoderArgs& args)
      : args_(args), isa_(kernels()), rows_(args.attention.batch * args.attention.queries) {
    const Attention& a = args.attention;
    const int64_t few = a.queries * a.repeats();
    packs_ = few > kFewRows || a.head_dim % isa_.lanes != 0;
    attention_queries_ = packs_ ? std::max<int64_t>(1, kAttentionRows / a.repeats()) : a.queries;
    attention_queries_ = std::min(attention_queries_, a.queries);
    scratch_bytes_ = attention_scratch_bytes(attention_queries_ * a.repeats());
    allocate();
    build();
  }

  void run() {
    std::atomic<bool> out_of_memory{false};
    parallel(threads_, [&] {
      uint8_t* const scratch = thread_scratch(scratch_bytes_);
      if (scratch == nullptr) out_of_memory = true;
      barrier(threads_);
      if (!out_of_memory) work(scratch);
    });
    if (out_of_memory) throw std::bad_alloc();
  }

 private:
  int64_t bytes(int64_t features) const {
    return divide_up(rows_ * features * type_bytes(args_.attention.type), kAlign) * kAlign;
  }

  void allocate() {
    static thread_local Scratch memory;
    const Attention& a = args_.attention;
    int64_t inner = 0;
    for (int64_t i = 0; i < args_.count; ++i) {
      const DecoderLayer& layer = args_.layers[i];
      inner_.push_back(view(layer.packed[4], layer.packed_bytes[4]).out_features);
      inner = std::max(inner, inner_.back());
    }
    const int64_t q = bytes(a.heads * a.head_dim), k = bytes(a.groups * a.head_dim);
    const int64_t x = bytes(args_.hidden);
    const int64_t panels = packs_ ? a.batch * a.groups * a.panel_bytes() : 0;
    const int64_t sizes[] = {x, q, k, k, q, bytes(inner), x, x, panels};
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    uint8_t* at = memory.get(total);
    if (at == nullptr) throw std::bad_alloc();
    uint8_t** const parts[] = {&w_.normed, &w_.q,      &w_.k, &w_.v,     &w_.attended,
                               &w_.inner,  &w_.middle, &w_.x, &w_.panels};
    for (int i = 0; i < 9; ++i) {
      *parts[i] = at;
      at += sizes[i];
    }
    if (!packs_) w_.panels = nullptr;
  }

  void build() {
    const Attention& a = args_.attention;
    const int64_t q = a.heads * a.head_dim, k = a.groups * a.head_dim;
    threads_ = 1;
    for (int64_t i = 0; i < args_.count; ++i) {
      const DecoderLayer& layer = args_.layers[i];
      const auto linear = [&](int which, const void* x, int64_t in, void* y, int64_t out,
                              const void* residual) {
        return LinearArgs{layer.packed[which],
                          static_cast<size_t>(layer.packed_bytes[which]),
                          x,
                          rows_,
                          in,
                          in,
                          a.type,
                          y,
                          out,
                          residual,
                          Activation::kNone,
                          nullptr,
                          0};
      };
      const LinearArgs qkv[] = {linear(0, w_.normed, args_.hidden, w_.q, q, nullptr),
                                linear(1, w_.normed, args_.hidden, w_.k, k, nullptr),
                                linear(2, w_.normed, args_.hidden, w_.v, k, nullptr)};
      const LinearArgs o = linear(3, w_.attended, q, w_.middle, args_.hidden, input(i));
      LinearArgs glu = linear(4, w_.normed, args_.hidden, w_.inner, inner_[i], nullptr);
      glu.activation = args_.activation;
      glu.up = layer.packed[5];
      glu.up_bytes = static_cast<size_t>(layer.packed_bytes[5]);
      if (glu.up == nullptr) fail("packed buffer: too short for a header");
      const LinearArgs down = linear(6, w_.inner, inner_[i], w_.x, args_.hidden, w_.middle);
      const Phases& made = phases_.emplace_back(qkv, o, glu, down);
      threads_ = std::max({threads_, made.qkv.threads(), made.glu.threads()});
    }
    for (Phases& p : phases_) {
      for (LinearTasks* tasks : {&p.qkv, &p.o, &p.glu, &p.down}) {
        tasks->cut(threads_);
        scratch_bytes_ = std::max(scratch_bytes_, tasks->scratch_bytes());
      }
    }
  }

  const uint8_t* input(int64_t layer) const {
    return layer == 0 ? static_cast<const uint8_t*>(args_.x) : w_.x;
  }

  void norm(Counter& counter, const uint8_t* x, const void* weight, void* y) const {
    const Type type = args_.attention.type;
    const int64_t stride = args_.hidden * type_bytes(type);
    counter.run(divide_up(rows_, kNormRows), [&](int64_t task) {
      for (int64_t r = task * kNormRows; r < std::min(rows_, (task + 1) * kNormRows); ++r) {
        isa_.rms_norm(type, x + r * stride, weight, args_.hidden, args_.eps,
                      static_cast<uint8_t*>(y) + r * stride);
      }
    });
    barrier(threads_);
  }

  void linear(LinearTasks& tasks, uint8_t* scratch) const {
    tasks.run(scratch);
    barrier(threads_);
  }

  void attention(int64_t layer, Phases& p, uint8_t* scratch) const {
    Attention call = args_.attention;
    call.q = w_.q;
    call.k = w_.k;
    call.v = w_.v;
    call.y = w_.attended;
    call.keys = static_cast<uint8_t*>(args_.cache[2 * layer]);
    call.values = static_cast<uint8_t*>(args_.cache[2 * layer + 1]);
    call.panels = w_.panels;
    const int64_t pairs = call.batch * call.groups;
    if (packs_) {
      p.append.run(
          pairs, [&](int64_t pair) { isa_.append(call, pair / call.groups, pair % call.groups); });
      barrier(threads_);
    }
    const int64_t blocks = divide_up(call.queries, attention_queries_);
    p.attend.run(pairs * blocks, [&](int64_t task) {
      const int64_t batch = task / blocks / call.groups, group = task / blocks % call.groups;
      if (!packs_) isa_.append(call, batch, group);
      // The last queries see most keys: they come first.
      const int64_t first = (blocks - 1 - task % blocks) * attention_queries_;
      const int64_t queries = std::min(attention_queries_, call.queries - first);
      isa_.attend(call, batch, group, first, queries, scratch);
    });
    barrier(threads_);
  }

  void work(uint8_t* scratch) {
    StageClock clock(is_timed_.exchange(true) ? nullptr : args_.stage_seconds);
    for (int64_t i = 0; i < args_.count; ++i) {
      Phases& p = phases_[i];
      norm(p.attention_norm, input(i), args_.layers[i].attention_norm, w_.normed);
      clock.lap();
      linear(p.qkv, scratch);
      clock.lap();
      attention(i, p, scratch);
      clock.lap();
      linear(p.o, scratch);
      clock.lap();
      norm(p.mlp_norm, w_.middle, args_.layers[i].mlp_norm, w_.normed);
      clock.lap();
      linear(p.glu, scratch);
      clock.lap();
      linear(p.down, scratch);
      clock.lap();
    }
    norm(end_, w_.x, args_.end_norm, args_.y);
    clock.lap();
  }

  const DecoderArgs& args_;
  const Kernels& isa_;
  const int64_t rows_;
  bool packs_;
  int64_t attention_queries_;
  size_t scratch_bytes_;
  int threads_;
  Workspace w_;
  std::vector<int64_t> inner_;
  std::deque<Phases> phases_;
  Counter end_;
  std::atomic<bool> is_timed_{false};  // one thread sees to it: all wait for each other
};

}  // namespace

void decoder(const DecoderArgs& args) {
  check(args);
  Decoder(args).run();
}

}  // namespace finegates
