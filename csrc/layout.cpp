#include "layout.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace finegates {
namespace {

constexpr char kMagic[4] = {'F', 'G', 'P', 'K'};
constexpr uint16_t kVersion = 1;
constexpr int64_t kMaxFeatures = int64_t{1} << 30;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

void check_index(const char* name, bool given, const int32_t* index, int64_t kept, int64_t full) {
  if (!given) {
    if (kept != full) {
      fail(std::string(name) + " is None, so the weight must have " + std::to_string(full) +
           " of them, got " + std::to_string(kept));
    }
    return;
  }
  if (index == nullptr && kept > 0) fail(std::string(name) + " is a null pointer");
  int64_t previous = -1;
  for (int64_t i = 0; i < kept; ++i) {
    if (index[i] < 0 || index[i] >= full) {
      fail(std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(index[i]) +
           " is outside [0, " + std::to_string(full) + ")");
    }
    if (index[i] <= previous) {
      fail(std::string(name) + " must be strictly increasing, got " + std::to_string(previous) +
           " then " + std::to_string(index[i]));
    }
    previous = index[i];
  }
}

// Full index where a block starts; the last entry is the full length.
int64_t block_start(const int32_t* index, int64_t kept, int64_t full, int64_t block,
                    int64_t block_length) {
  if (block == 0) return 0;
  const int64_t first = block * block_length;
  if (first >= kept) return full;
  return index ? index[first] : first;
}

int64_t count_chunks(const int32_t* index, int64_t kept, int64_t full, int64_t blocks,
                     int64_t length) {
  int64_t chunks = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    chunks += divide_up(
        block_start(index, kept, full, b + 1, length) - block_start(index, kept, full, b, length),
        kChunk);
  }
  return chunks;
}

void write_segments(const int32_t* index, int64_t kept, int64_t full, int64_t blocks,
                    int64_t length, Segment* segments, uint16_t* masks) {
  int64_t chunk = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = block_start(index, kept, full, b, length);
    const int64_t end = block_start(index, kept, full, b + 1, length);
    segments[b] = {static_cast<uint32_t>(start), static_cast<uint32_t>(chunk)};
    const int64_t last = std::min(kept, (b + 1) * length);
    for (int64_t i = b * length; i < last; ++i) {
      const int64_t offset = (index ? index[i] : i) - start;
      masks[chunk + offset / kChunk] |= static_cast<uint16_t>(1u << (offset % kChunk));
    }
    chunk += divide_up(end - start, kChunk);
  }
  segments[blocks] = {static_cast<uint32_t>(full), static_cast<uint32_t>(chunk)};
}

struct Offsets {
  size_t row_segments, row_masks, column_segments, column_masks, bias, scale, panels, panel_bytes;
  size_t total;
};

Offsets offsets_of(const Header& h) {
  Offsets o;
  o.row_segments = sizeof(Header);
  o.row_masks = o.row_segments + (size_t{h.row_blocks} + 1) * sizeof(Segment);
  o.column_segments = round_up(o.row_masks + size_t{h.row_chunks} * 2, alignof(Segment));
  o.column_masks = o.column_segments + (size_t{h.column_blocks} + 1) * sizeof(Segment);
  o.bias = round_up(o.column_masks + (size_t{h.column_chunks} + 1) * 2, kAlign);
  const size_t row_values = size_t{h.row_blocks} * kPanel * sizeof(float);
  o.scale = o.bias + row_values;
  o.panels = o.scale + (static_cast<Type>(h.type) == Type::kI8 ? row_values : 0);
  const size_t units = divide_up(h.columns, unit_length(static_cast<Type>(h.type)));
  o.panel_bytes = units * kPanel * 4;
  o.total = o.panels + o.panel_bytes * h.row_blocks;
  return o;
}

// Balanced K blocks: 595 columns become 298 + 297, not 384 + 211. The cut depends on k alone, so
// the order of summation is a property of the layer.
int64_t block_columns_of(int64_t columns, Type type) {
  const int64_t unit = unit_length(type);
  const int64_t units = divide_up(columns, unit);
  const int64_t blocks = std::max<int64_t>(1, divide_up(units, kUnits));
  return std::max<int64_t>(1, divide_up(units, blocks)) * unit;
}

Header header_of(const LayerShape& s) {
  if (s.type > Type::kI8) fail("unknown weight type");
  for (const int64_t size : {s.rows, s.columns, s.out_features, s.in_features}) {
    if (size < 0 || size > kMaxFeatures) fail("a size is outside [0, 2^30]");
  }
  check_index("rows", s.has_rows, s.row_index, s.rows, s.out_features);
  check_index("columns", s.has_columns, s.column_index, s.columns, s.in_features);
  Header h = {};
  std::memcpy(h.magic, kMagic, sizeof(kMagic));
  h.version = kVersion;
  h.type = static_cast<uint8_t>(s.type);
  h.has_bias = s.has_bias;
  h.has_rows = s.has_rows;
  h.has_columns = s.has_columns;
  h.rows = static_cast<uint32_t>(s.rows);
  h.columns = static_cast<uint32_t>(s.columns);
  h.out_features = static_cast<uint32_t>(s.out_features);
  h.in_features = static_cast<uint32_t>(s.in_features);
  // No rows still make one block: it writes the zeros.
  h.row_blocks = static_cast<uint32_t>(std::max<int64_t>(1, divide_up(s.rows, kPanel)));
  const int64_t length = block_columns_of(s.columns, s.type);
  h.block_columns = static_cast<uint32_t>(length);
  h.column_blocks = static_cast<uint32_t>(std::max<int64_t>(1, divide_up(s.columns, length)));
  h.row_chunks = static_cast<uint32_t>(
      count_chunks(s.row_index, s.rows, s.out_features, h.row_blocks, kPanel));
  h.column_chunks = static_cast<uint32_t>(
      count_chunks(s.column_index, s.columns, s.in_features, h.column_blocks, length));
  return h;
}

// Without -mpopcnt the builtin is a call; this is a few vectorised operations.
uint32_t count_bits(uint32_t mask) {
  mask -= mask >> 1 & 0x5555u;
  mask = (mask & 0x3333u) + (mask >> 2 & 0x3333u);
  mask = (mask + (mask >> 4)) & 0x0f0fu;
  return (mask + (mask >> 8)) & 0x1fu;
}

void check_segments(const char* name, const Segment* segments, const uint16_t* masks,
                    int64_t blocks, int64_t chunks, int64_t kept, int64_t full, int64_t length) {
  bool good = segments[0].start == 0 && segments[0].chunk == 0 && segments[blocks].start == full &&
              segments[blocks].chunk == chunks;
  for (int64_t b = 0; good && b < blocks; ++b) {
    const int64_t start = segments[b].start, end = segments[b + 1].start;
    const int64_t first = segments[b].chunk, last = segments[b + 1].chunk;
    good = start <= end && end <= full && last - first == divide_up(end - start, kChunk) &&
           last <= chunks;
    if (!good) break;
    int64_t bits = 0;
    for (int64_t c = first; c < last; ++c) bits += count_bits(masks[c]);
    const int tail = static_cast<int>((end - start) % kChunk);
    good = bits == std::clamp<int64_t>(kept - b * length, 0, length) &&
           (tail == 0 || masks[last - 1] >> tail == 0);
  }
  if (!good) fail(std::string("packed buffer: damaged table of kept ") + name);
}

// Where weight [row, k] lies in its unit of 128 bytes, in elements. int8 goes in groups of 4
// outputs: their columns 0 and 1, then 2 and 3, so that one byte interleave makes pairs of bf16.
template <class T>
int64_t place(int64_t row, int64_t k) {
  if constexpr (sizeof(T) == 1) return row / 4 * 16 + k / 2 * 8 + row % 4 * 2 + k % 2;
  return row * static_cast<int64_t>(4 / sizeof(T)) + k;
}

uint8_t sign_magnitude(uint8_t x) { return x < 128 ? x : static_cast<uint8_t>(256 - x) | 128; }
uint8_t twos_complement(uint8_t x) { return x < 128 ? x : static_cast<uint8_t>(256 - (x & 127)); }

template <class T>
void copy_panels(const LayerShape& s, const T* weight, uint8_t* panels, size_t panel_bytes) {
  constexpr int64_t kUnit = 4 / sizeof(T);
  for (int64_t row = 0; row < s.rows; ++row) {
    T* out = reinterpret_cast<T*>(panels + row / kPanel * panel_bytes);
    const T* in = weight + row * s.columns;
    for (int64_t k = 0; k < s.columns; ++k) {
      T value = in[k];
      if constexpr (sizeof(T) == 1) {
        if (value == 128) fail("int8 weights must be in [-127, 127], got -128");
        value = sign_magnitude(value);
      }
      out[k / kUnit * kPanel * kUnit + place<T>(row % kPanel, k % kUnit)] = value;
    }
  }
}

// Rows of the weight: those of `rows`, or the first `count` where it is null.
template <class T>
void read_rows(const Packed& p, const int64_t* rows, int64_t count, T* weight) {
  constexpr int64_t kUnit = 4 / sizeof(T);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows ? rows[i] : i;
    const T* in = reinterpret_cast<const T*>(p.panels + row / kPanel * p.panel_bytes);
    for (int64_t k = 0; k < p.columns; ++k) {
      T value = in[k / kUnit * kPanel * kUnit + place<T>(row % kPanel, k % kUnit)];
      if constexpr (sizeof(T) == 1) value = twos_complement(value);
      weight[i * p.columns + k] = value;
    }
  }
}

void read_rows(const Packed& p, const int64_t* rows, int64_t count, void* weight) {
  if (weight == nullptr && count > 0 && p.columns > 0) fail("weight is null");
  if (p.type == Type::kI8) return read_rows(p, rows, count, static_cast<uint8_t*>(weight));
  if (p.type == Type::kF32) return read_rows(p, rows, count, static_cast<uint32_t*>(weight));
  read_rows(p, rows, count, static_cast<uint16_t*>(weight));
}

void read_index(const Segment* segments, const uint16_t* masks, int64_t blocks, int32_t* index) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (uint32_t c = segments[b].chunk; c < segments[b + 1].chunk; ++c) {
      const uint32_t base = segments[b].start + (c - segments[b].chunk) * kChunk;
      for (uint32_t bit = 0; bit < kChunk; ++bit) {
        if (masks[c] >> bit & 1) *index++ = static_cast<int32_t>(base + bit);
      }
    }
  }
}

bool same_table(const Segment* a, const uint16_t* a_masks, const Segment* b,
                const uint16_t* b_masks, int64_t blocks) {
  return std::memcmp(a, b, (blocks + 1) * sizeof(Segment)) == 0 &&
         std::memcmp(a_masks, b_masks, a[blocks].chunk * sizeof(uint16_t)) == 0;
}

}  // namespace

bool same_columns(const Packed& a, const Packed& b) {
  return a.type == b.type && a.in_features == b.in_features && a.columns == b.columns &&
         same_table(a.column_segments, a.column_masks, b.column_segments, b.column_masks,
                    a.column_blocks);
}

bool same_rows(const Packed& a, const Packed& b) {
  return a.out_features == b.out_features && a.rows == b.rows &&
         same_table(a.row_segments, a.row_masks, b.row_segments, b.row_masks, a.row_blocks);
}

size_t packed_bytes(const LayerShape& shape) { return offsets_of(header_of(shape)).total; }

void pack(const LayerShape& s, const void* weight, const float* bias, const float* scale,
          void* buffer, size_t bytes) {
  const Header h = header_of(s);
  const Offsets o = offsets_of(h);
  if (buffer == nullptr || bytes != o.total || reinterpret_cast<uintptr_t>(buffer) % kAlign) {
    fail("the buffer to pack into must be 64-byte aligned with " + std::to_string(o.total) +
         " bytes");
  }
  if (weight == nullptr && s.rows > 0 && s.columns > 0) fail("weight is null");
  if (bias == nullptr && s.has_bias && s.rows > 0) fail("bias is null");
  if (scale == nullptr && s.type == Type::kI8 && s.rows > 0) fail("scale is null");
  uint8_t* base = static_cast<uint8_t*>(buffer);
  std::memset(base, 0, bytes);
  std::memcpy(base, &h, sizeof(h));
  write_segments(s.row_index, s.rows, s.out_features, h.row_blocks, kPanel,
                 reinterpret_cast<Segment*>(base + o.row_segments),
                 reinterpret_cast<uint16_t*>(base + o.row_masks));
  write_segments(s.column_index, s.columns, s.in_features, h.column_blocks, h.block_columns,
                 reinterpret_cast<Segment*>(base + o.column_segments),
                 reinterpret_cast<uint16_t*>(base + o.column_masks));
  if (s.has_bias && s.rows > 0) std::memcpy(base + o.bias, bias, s.rows * sizeof(float));
  if (s.type == Type::kI8) {
    if (s.rows > 0) std::memcpy(base + o.scale, scale, s.rows * sizeof(float));
    copy_panels(s, static_cast<const uint8_t*>(weight), base + o.panels, o.panel_bytes);
  } else if (s.type == Type::kF32) {
    copy_panels(s, static_cast<const uint32_t*>(weight), base + o.panels, o.panel_bytes);
  } else {
    copy_panels(s, static_cast<const uint16_t*>(weight), base + o.panels, o.panel_bytes);
  }
}

Packed view(const void* buffer, size_t bytes) {
  if (buffer == nullptr || bytes < sizeof(Header)) fail("packed buffer: too short for a header");
  if (reinterpret_cast<uintptr_t>(buffer) % kAlign) fail("packed buffer: not 64-byte aligned");
  const uint8_t* base = static_cast<const uint8_t*>(buffer);
  const Header& h = *reinterpret_cast<const Header*>(base);
  if (std::memcmp(h.magic, kMagic, sizeof(kMagic)) != 0) {
    fail("packed buffer: no finegates header (pack the weight first)");
  }
  if (h.version != kVersion) {
    fail("packed buffer: version " + std::to_string(h.version) + ", this build reads " +
         std::to_string(kVersion));
  }
  const Type type = static_cast<Type>(h.type);
  const auto set = [](uint8_t byte) { return byte != 0; };
  if (h.has_bias > 1 || h.has_rows > 1 || h.has_columns > 1 || h.reserved != 0 ||
      std::any_of(std::begin(h.padding), std::end(h.padding), set) ||
      (!h.has_rows && h.rows != h.out_features) || (!h.has_columns && h.columns != h.in_features)) {
    fail("packed buffer: damaged flags");
  }
  if (h.type > 2 || h.rows > kMaxFeatures || h.columns > kMaxFeatures ||
      h.out_features > kMaxFeatures || h.in_features > kMaxFeatures ||
      h.block_columns != block_columns_of(h.columns, type) ||
      h.row_blocks != std::max<int64_t>(1, divide_up(h.rows, kPanel)) ||
      h.column_blocks != std::max<int64_t>(1, divide_up(h.columns, h.block_columns))) {
    fail("packed buffer: damaged header");
  }
  const Offsets o = offsets_of(h);
  if (o.total != bytes) {
    fail("packed buffer: header asks for " + std::to_string(o.total) + " bytes, got " +
         std::to_string(bytes));
  }
  Packed p;
  p.type = type;
  p.has_bias = h.has_bias;
  p.has_rows = h.has_rows;
  p.has_columns = h.has_columns;
  p.rows = h.rows;
  p.columns = h.columns;
  p.out_features = h.out_features;
  p.in_features = h.in_features;
  p.row_blocks = h.row_blocks;
  p.column_blocks = h.column_blocks;
  p.block_columns = h.block_columns;
  p.row_segments = reinterpret_cast<const Segment*>(base + o.row_segments);
  p.row_masks = reinterpret_cast<const uint16_t*>(base + o.row_masks);
  p.column_segments = reinterpret_cast<const Segment*>(base + o.column_segments);
  p.column_masks = reinterpret_cast<const uint16_t*>(base + o.column_masks);
  p.bias = reinterpret_cast<const float*>(base + o.bias);
  p.scale = type == Type::kI8 ? reinterpret_cast<const float*>(base + o.scale) : nullptr;
  p.panels = base + o.panels;
  p.panel_bytes = o.panel_bytes;
  check_segments("rows", p.row_segments, p.row_masks, p.row_blocks, h.row_chunks, p.rows,
                 p.out_features, kPanel);
  check_segments("columns", p.column_segments, p.column_masks, p.column_blocks, h.column_chunks,
                 p.columns, p.in_features, p.block_columns);
  return p;
}

void unpack_weight(const Packed& packed, void* weight) {
  read_rows(packed, nullptr, packed.rows, weight);
}

void unpack_rows(const Packed& packed, const int64_t* rows, int64_t count, void* weight) {
  if (rows == nullptr && count > 0) fail("rows is null");
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= packed.rows) {
      throw std::out_of_range("rows must lie in [0, " + std::to_string(packed.rows) + "), got " +
                              std::to_string(rows[i]));
    }
  }
  read_rows(packed, rows, count, weight);
}

void unpack_indices(const Packed& packed, int32_t* rows, int32_t* columns) {
  if (rows) read_index(packed.row_segments, packed.row_masks, packed.row_blocks, rows);
  if (columns) {
    read_index(packed.column_segments, packed.column_masks, packed.column_blocks, columns);
  }
}

}  // namespace finegates
