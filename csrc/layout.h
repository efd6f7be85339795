// The packed layer: one flat buffer with a header, index tables, bias and weight panels.
//
// It is the only thing a call needs besides x and y. Every level of the instruction set reads the
// same layout, so a buffer may move between processes that chose different levels.
//
//   Header | row Segments | row masks | column Segments | column masks | bias [| scale] | panels
//
// A panel holds, for each unit of 1, 2 or 4 columns (4 bytes of weight), 32 outputs: 128 bytes.
// int8 is stored as sign and magnitude, which a table of 128 entries turns into bf16.
//
// Kept rows are cut into blocks of kPanel, kept columns into K blocks. A block covers the *full*
// indices from its own start to the start of the next block, in chunks of 16 with one bit for each
// index: kept or not. Gathering is then compress(chunk, mask), scattering expand(chunk, mask),
// and each panel owns a range of y, zeros between its rows included.
#pragma once

#include <cstddef>
#include <cstdint>

namespace finegates {

constexpr int kPanel = 32;  // outputs of one weight panel
constexpr int kChunk = 16;  // full indices described by one mask
constexpr int kUnits =
    384;  // longest K block in units of 4 bytes (one fp32, two bf16, four int8 weights)
constexpr size_t kAlign = 64;

enum class Type : uint8_t { kF32 = 0, kBf16 = 1, kI8 = 2 };  // kI8: weights only

// Functions of headers that ISA files include are static: a weak copy compiled for AVX-512 could
// serve every caller.
static constexpr int type_bytes(Type type) {
  return type == Type::kF32 ? 4 : type == Type::kBf16 ? 2 : 1;
}
static constexpr int unit_length(Type type) { return 4 / type_bytes(type); }
static constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

struct Header {
  char magic[4];
  uint16_t version;
  uint8_t type;
  uint8_t has_bias;
  uint8_t has_rows;     // rows were given (also when they happen to be all of them)
  uint8_t has_columns;  // columns were given
  uint16_t reserved;
  uint32_t rows;          // n: kept rows
  uint32_t columns;       // k: kept columns
  uint32_t out_features;  // y's last dimension
  uint32_t in_features;   // x's last dimension
  uint32_t row_blocks;
  uint32_t column_blocks;
  uint32_t row_chunks;
  uint32_t column_chunks;
  uint32_t block_columns;  // kept columns in every K block but the last
  uint8_t padding[16];
};
static_assert(sizeof(Header) == 64, "the header is one cache line");

struct Segment {
  uint32_t start;  // first full index
  uint32_t chunk;  // first mask
};

// A checked view of a packed buffer.
struct Packed {
  Type type;
  bool has_bias, has_rows, has_columns;
  int64_t rows, columns, out_features, in_features;
  int64_t row_blocks, column_blocks, block_columns;
  const Segment* row_segments;  // row_blocks + 1
  const uint16_t* row_masks;
  const Segment* column_segments;  // column_blocks + 1
  const uint16_t* column_masks;    // one zero mask follows the last
  const float* bias;               // row_blocks * kPanel
  const float* scale;              // the same, of int8 weights; null for others
  const uint8_t* panels;
  size_t panel_bytes;
};

struct LayerShape {
  Type type;
  int64_t rows, columns, out_features, in_features;
  bool has_bias;
  bool has_rows, has_columns;  // false: all of them
  const int32_t* row_index;
  const int32_t* column_index;
};

// All three throw std::invalid_argument with a one-line message.
size_t packed_bytes(const LayerShape& shape);
// int8 weights are in [-127, 127] and have one scale a row.
void pack(const LayerShape& shape, const void* weight, const float* bias, const float* scale,
          void* buffer, size_t bytes);
Packed view(const void* buffer, size_t bytes);

// Whether x is gathered alike for both layers, and whether their results are scattered alike.
bool same_columns(const Packed& a, const Packed& b);
bool same_rows(const Packed& a, const Packed& b);

void unpack_weight(const Packed& packed, void* weight);
// `count` of the kept rows, one behind the other; throws std::out_of_range for one there isn't.
void unpack_rows(const Packed& packed, const int64_t* rows, int64_t count, void* weight);
void unpack_indices(const Packed& packed, int32_t* rows, int32_t* columns);

}  // namespace finegates
