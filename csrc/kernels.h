// What an instruction set offers: one table, chosen once (isa.cpp).
#pragma once

#include "layout.h"

namespace finegates {

enum class Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

// How a tile multiplies. The operand of x is always gathered into blocks of rows with a fixed
// stride, so every row of a tile is one displacement away.
enum class Kind : int {
  kF32 = 0,   // fp32 x, fp32 weight: one FMA a unit
  kWide = 1,  // fp32 x, bf16 weight widened in registers: two FMAs a unit
  kDot = 2,   // bf16 x, bf16 weight: one dot product of two pairs a unit
  kI8 = 3,    // fp32 x, int8 weight widened to fp32: four FMAs a unit
  kI8Dot = 4  // bf16 x, int8 weight widened to bf16: two dot products a unit
};
constexpr int kKinds = 5;
static constexpr bool is_dot(Kind kind) { return kind == Kind::kDot || kind == Kind::kI8Dot; }

// Units of 4 bytes of x that meet one unit of the weight.
static constexpr int operand_units(Kind kind) {
  return kind == Kind::kI8 ? 4 : kind == Kind::kWide || kind == Kind::kI8Dot ? 2 : 1;
}

// Bytes of one gathered row in one K block.
static constexpr int row_stride(Kind kind) { return kUnits * 4 * operand_units(kind); }

constexpr int kGatherTail = 128;  // bytes a compressing store may write past its row

// Bytes of one K block of `rows` gathered rows.
static constexpr int64_t block_bytes(Kind kind, int64_t rows) {
  return rows * row_stride(kind) + kGatherTail;
}

// Whose measurements decide how few rows meet their weights: those of the processor that runs, or
// of the one most like it (isa.h).
enum class Tune : int { kZen4 = 0, kZen5 = 1 };
constexpr int kTunes = 2;

// The lines of its weights that a tile asks for ahead of their use; the hardware's prefetcher
// fetches others.
enum class Ahead { kNothing, kOneInEight, kEveryLine };

// The panels that meet a few rows at once, and how their lines are asked for.
struct Group {
  int panels;
  Ahead lines;
  int ahead;  // bytes of each panel
};

struct Call {
  Packed layer;
  Packed up;  // the second layer of a gated pair, if `pair`; same tables as `layer`
  bool pair;
  Kind kind;
  Tune tune;
  Activation activation;
  Type type;  // of x, residual and y
  const uint8_t* x;
  uint8_t* y;
  const uint8_t* residual;  // null or shaped like y
  int64_t x_stride;         // bytes between rows of x
  int64_t y_stride;         // bytes between rows of y and of residual
};

// How keys are masked: numbers are added to the scores, or a byte says whether a key is kept.
enum class Mask : int { kNone = 0, kAddF32 = 1, kAddBf16 = 2, kKeep = 3 };

// out = softmax(scale q k^T + mask) v, for each head of each sequence.
struct SelfAttention {
  Type type;  // of q, k, v and out
  const uint8_t* q;
  const uint8_t* k;
  const uint8_t* v;
  uint8_t* out;  // may be q
  int64_t length, heads, head_size;
  int64_t stride;  // bytes from row to row of all four, [sequences * length, heads * head_size]
  float scale;
  Mask mask_type;
  const uint8_t* mask;      // [sequences, heads, length, length], the last one contiguous
  int64_t mask_strides[3];  // bytes; 0 for what all share
};

// Where things lie in the scratch of one head's attention, in floats.
struct AttentionScratch {
  int64_t mask_stride, mask, x, p, c, keys, values, total;
};

static inline AttentionScratch attention_scratch(const SelfAttention& a, int tile_rows) {
  const int64_t features = (a.head_size + kPanel - 1) / kPanel * kPanel;
  const int64_t length = (a.length + kPanel - 1) / kPanel * kPanel;
  AttentionScratch at;
  at.mask_stride = length + kChunk;
  at.mask = 0;
  at.x = at.mask + tile_rows * at.mask_stride;
  at.p = at.x + tile_rows * kUnits + kChunk;
  at.c = at.p + tile_rows * kUnits;
  at.keys = at.c + tile_rows * features;
  at.values = at.keys + length * features;
  at.total = at.values + length * features;
  return at;
}

constexpr int kMaxHeadSize = kUnits;  // most features of a head

struct LayerNorm {
  Type type;   // of x, weight and bias
  uint8_t* x;  // [rows, features], in place
  int64_t features;
  const uint8_t* weight;
  const uint8_t* bias;
  float eps;
};

static constexpr int64_t norm_floats(int64_t features) { return 3 * (features + kPanel + kChunk); }

// Attention of new tokens over a cache that holds `past` earlier ones. Tensors are of one type;
// strides are in elements.
struct Attention {
  Type type;
  int64_t batch, queries, heads, groups, head_dim, past, capacity;
  const uint8_t *q, *k, *v;  // [batch, queries, heads or groups, head_dim]
  uint8_t* y;                // like q
  uint8_t *keys, *values;    // [batch, groups, capacity, head_dim]
  const uint8_t *cos, *sin;  // [positions, head_dim]; q and k turn by halves of the head
  const int64_t* positions;  // [batch, queries]
  const uint8_t* mask;       // null, or a byte for each key, 0 where it is hidden
  int64_t mask_batch_stride, mask_query_stride;
  bool causal;  // token i sees no key after past + i
  float scale;
  uint8_t* panels;  // null, or room for panel_bytes() of each batch entry and group

  // Always inline, for the reason that functions of layout.h are static.
  __attribute__((always_inline)) int64_t tokens() const { return past + queries; }
  __attribute__((always_inline)) int64_t repeats() const { return heads / groups; }
  // A head's dimension and the number of tokens, rounded up to whole panels, in fp32.
  __attribute__((always_inline)) int64_t panel_bytes() const {
    const int64_t wide = (head_dim + kPanel - 1) / kPanel * kPanel;
    const int64_t long_ = (tokens() + kPanel - 1) / kPanel * kPanel;
    return 2 * wide * long_ * static_cast<int64_t>(sizeof(float));
  }
};

// Keys whose scores wait together: one K block of fp32.
constexpr int64_t kKeyBlock = kUnits;

// Of one attend(): queries, scores, results and two statistics of each row.
static constexpr int64_t attention_scratch_bytes(int64_t rows) {
  return rows * (2 * kKeyBlock + kMaxHeadSize + 2 * kChunk) * static_cast<int64_t>(sizeof(float));
}

struct Kernels {
  const char* name;
  bool has_dot;
  int lanes;              // floats of one register
  int tile_rows[kKinds];  // most rows of one tile
  // Gathers the kept columns of `rows` rows: K block b of row r goes to
  // a + b * block_bytes(kind, rows) + r * row_stride(kind).
  void (*gather)(const Call& call, int64_t first_row, int64_t rows, uint8_t* a);
  // y[first_row.., range of the panels] from gathered rows; `c` holds rows * kPanel * kMaxSpan +
  // kChunk floats.
  void (*multiply)(const Call& call, int64_t first_row, int64_t rows, int64_t first_panel,
                   int64_t last_panel, const uint8_t* a, float* c);
  // One head of one sequence; `scratch` is as large as AttentionScratch says.
  void (*self_attention)(const SelfAttention& attention, int64_t sequence, int64_t head,
                         float* scratch);
  // LayerNorm of some rows; `scratch` holds norm_floats(features).
  void (*layer_norm)(const LayerNorm& norm, int64_t first_row, int64_t rows, float* scratch);
  // y = weight * x / sqrt(mean(x^2) + eps), n elements of `type`.
  void (*rms_norm)(Type type, const void* x, const void* weight, int64_t n, float eps, void* y);
  // Turns the new keys of one batch entry and group, writes them and the values into the cache, and
  // packs the cache into panels if there is room for them.
  void (*append)(const Attention& call, int64_t batch, int64_t group);
  // y of `queries` tokens from `first`, all heads of the group: from the panels, or, for few rows,
  // from the cache itself.
  void (*attend)(const Attention& call, int64_t batch, int64_t group, int64_t first,
                 int64_t queries, uint8_t* scratch);
};

constexpr int kMaxGroup = 4;  // most panels one tile covers
constexpr int kMaxSpan = 4;   // most panels whose results wait together

static constexpr int64_t result_floats(int64_t rows) { return rows * kPanel * kMaxSpan + kChunk; }

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kNeonKernels;

}  // namespace finegates
