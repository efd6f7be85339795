#include "encoder_layer.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "parallel.h"
#include "pruned_linear.h"
#include "scratch.h"

namespace finegates {
namespace {

// Sequences go through the layer in groups of about this many rows, so that what lies between the
// Linears stays in the cache and the scratch stays small.
constexpr int64_t kGroupRows = 512;
constexpr int64_t kNormRows = 16;  // of one task
constexpr int64_t kMaxSize = int64_t{1} << 30;

// What lies between the Linears, of the calling thread.
thread_local Scratch between;

// Runs body(task, scratch) for each task; `bytes` of scratch for each thread.
template <class Body>
void for_each(int64_t tasks, int threads, size_t bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&] {
    float* const scratch = reinterpret_cast<float*>(thread_scratch(bytes));
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, scratch);
  });
  if (out_of_memory) throw std::bad_alloc();
}

// One Linear of the layer: x and y are contiguous rows.
LinearArgs linear(const PackedBytes& packed, const EncoderLayerArgs& args, int64_t rows,
                  const void* x, int64_t in_features, void* y, int64_t out_features,
                  const void* residual = nullptr, Activation activation = Activation::kNone) {
  return {packed.data, packed.bytes, x, rows,         in_features,
          in_features, args.type,    y, out_features, residual,
          activation,  nullptr,      0};
}

void check(const EncoderLayerArgs& a, int64_t inner) {
  for (const int64_t size : {a.sequences, a.length, a.features, a.heads, a.head_size}) {
    if (size < 0 || size > kMaxSize) throw std::invalid_argument("a size is outside [0, 2^30]");
  }
  const int64_t width = a.heads * a.head_size;
  if (width > kMaxSize || a.head_size < 1 || a.head_size > kMaxHeadSize) {
    throw std::invalid_argument("the head size must be 1 to " + std::to_string(kMaxHeadSize) +
                                ", got " + std::to_string(a.head_size));
  }
  const int64_t rows = a.sequences * a.length;
  int64_t bytes;
  if (__builtin_mul_overflow(rows, std::max({a.features, 3 * width, inner}) * 16, &bytes)) {
    throw std::invalid_argument("x has too many rows");
  }
  const bool missing = a.x == nullptr || a.y == nullptr || a.norm_weight[0] == nullptr ||
                       a.norm_weight[1] == nullptr || a.norm_bias[0] == nullptr ||
                       a.norm_bias[1] == nullptr;
  if (rows > 0 && a.features > 0 && missing) throw std::invalid_argument("x, y or a norm is null");
  if (a.mask_type != Mask::kNone && a.mask == nullptr && rows > 0) {
    throw std::invalid_argument("mask is null");
  }
}

}  // namespace

void encoder_layer(const EncoderLayerArgs& args) {
  const int64_t inner = view(args.up.data, args.up.bytes).out_features;
  check(args, inner);
  const Kernels& isa = kernels();
  const int64_t width = args.heads * args.head_size;
  const int64_t group = std::max<int64_t>(1, kGroupRows / std::max<int64_t>(args.length, 1));
  const int64_t most_rows = std::min(group, args.sequences) * args.length;
  const int element = type_bytes(args.type);
  // query, key and value are done with when `inner` is written.
  const size_t head_bytes = most_rows * std::max(3 * width, inner) * element;
  const size_t aligned = divide_up(head_bytes, kAlign) * kAlign;
  uint8_t* const heads = between.get(aligned + most_rows * args.features * element + kAlign);
  if (heads == nullptr) throw std::bad_alloc();
  uint8_t* const h = heads + aligned;

  SelfAttention attention;
  attention.type = args.type;
  attention.length = args.length;
  attention.heads = args.heads;
  attention.head_size = args.head_size;
  attention.stride = width * element;
  attention.scale = args.scale;
  attention.mask_type = args.mask_type;
  std::copy_n(args.mask_strides, 3, attention.mask_strides);
  const int tile_rows = std::max(isa.tile_rows[static_cast<int>(Kind::kF32)],
                                 isa.tile_rows[static_cast<int>(Kind::kDot)]);
  const size_t attention_bytes = attention_scratch(attention, tile_rows).total * sizeof(float);
  const size_t norm_bytes = norm_floats(args.features) * sizeof(float);

  for (int64_t first = 0; first < args.sequences; first += group) {
    const int64_t sequences = std::min(group, args.sequences - first);
    const int64_t rows = sequences * args.length;
    const int64_t at = first * args.length * args.features * element;
    const uint8_t* const x = static_cast<const uint8_t*>(args.x) + at;
    uint8_t* const y = static_cast<uint8_t*>(args.y) + at;
    uint8_t* const q = heads;
    uint8_t* const k = q + rows * width * element;
    uint8_t* const v = k + rows * width * element;

    const LinearArgs projections[] = {linear(args.query, args, rows, x, args.features, q, width),
                                      linear(args.key, args, rows, x, args.features, k, width),
                                      linear(args.value, args, rows, x, args.features, v, width)};
    pruned_linears(projections, 3);

    attention.q = q;
    attention.k = k;
    attention.v = v;
    attention.out = q;
    attention.mask = static_cast<const uint8_t*>(args.mask) + first * args.mask_strides[0];
    const int threads = max_threads();
    for_each(sequences * args.heads, threads, attention_bytes, [&](int64_t task, float* scratch) {
      isa.self_attention(attention, task / args.heads, task % args.heads, scratch);
    });

    const auto norm = [&](int i, uint8_t* values) {
      const LayerNorm call = {args.type,
                              values,
                              args.features,
                              static_cast<const uint8_t*>(args.norm_weight[i]),
                              static_cast<const uint8_t*>(args.norm_bias[i]),
                              args.eps[i]};
      for_each(divide_up(rows, kNormRows), threads, norm_bytes, [&](int64_t task, float* scratch) {
        const int64_t row = task * kNormRows;
        isa.layer_norm(call, row, std::min(kNormRows, rows - row), scratch);
      });
    };
    pruned_linear(linear(args.output, args, rows, q, width, h, args.features, x));
    norm(0, h);
    pruned_linear(
        linear(args.up, args, rows, h, args.features, heads, inner, nullptr, args.activation));
    pruned_linear(linear(args.down, args, rows, heads, inner, y, args.features, h));
    norm(1, y);
  }
}

}  // namespace finegates
