// What both attentions share: rows in and out of fp32, both products on the tiles of the matrix
// product, with keys and values packed as weights, and the softmax between them. Part of
// kernel_body.h, under its rules.
#pragma once

#include "kernels.h"

namespace finegates {
namespace {

constexpr int kPRow = row_stride(Kind::kF32) / 4;  // floats from row to row of a tile's operand
constexpr uint16_t kAllKept[kPRow / kChunk] = {
    0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff,
    0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff};

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Widens a row; up to the next multiple of kPanel it ends in zeros.
template <class T>
void read_row(float* out, const T* in, int64_t length) {
  const int64_t whole = length / kChunk * kChunk;
  for (int64_t at = 0; at < whole; at += kPRow) {
    Vec::gather(out + at, in + at, kAllKept, whole - at < kPRow ? whole - at : kPRow);
  }
  for (int64_t at = whole; at < round_up(length, kPanel); ++at) out[at] = 0.0f;
  const uint16_t rest = static_cast<uint16_t>((1u << (length - whole)) - 1);
  if (rest != 0) Vec::gather(out + whole, in + whole, &rest, length - whole);
}

// Rounds a row; `in` is readable up to the next multiple of kPanel.
template <class T>
void write_row(T* out, const float* in, int64_t length) {
  const Vec::Spread low = Vec::spread(0xffff, 0), high = Vec::spread(0xffff, kChunk);
  for (; length > 0; length -= kPanel, in += kPanel, out += kPanel) {
    const auto panel = Vec::load_panel(in);
    if (length <= kChunk) {
      Vec::write(out, Vec::expand(panel, low), static_cast<int>(length));
    } else {
      Vec::write_pair(out, Vec::expand(panel, low), Vec::expand(panel, high),
                      length < kPanel ? static_cast<int>(length) - kChunk : kChunk);
    }
  }
}

// bf16 is multiplied in pairs where the level has a dot product, and widened to fp32 elsewhere.
template <class T>
constexpr bool kPairs = sizeof(T) == 2 && Vec::kHasDot;
template <class T>
constexpr Kind kAttentionKind = kPairs<T> ? Kind::kDot : Kind::kF32;

// Floats of one row of at most kMaxHeadSize features, two of them for pairs, with what gathering
// writes past its end.
constexpr int64_t kPackRow = kMaxHeadSize + kPanel;

template <class T>
constexpr int64_t units_of(int64_t length) {
  return kPairs<T> ? (length + 1) / 2 : length;
}

// A row as a tile's operand: zeros up to the next multiple of kPanel.
template <class T>
void read_operand(float* out, const T* in, int64_t length) {
  if constexpr (kPairs<T>) {
    uint16_t* const pairs = reinterpret_cast<uint16_t*>(out);
    __builtin_memcpy(pairs, in, length * sizeof(T));
    for (int64_t i = length; i < round_up(length, kPanel); ++i) pairs[i] = 0;
  } else {
    read_row(out, in, length);
  }
}

// Rows of k, `stride` bytes apart, as the weight of a tile: panels of 32 keys, a unit for each of d
// features or pair of them. `row` holds kPackRow floats.
template <class T>
void pack_keys(const uint8_t* k, int64_t stride, int64_t keys, int64_t d, float* panels,
               float* row) {
  const int64_t units = units_of<T>(d);
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) {
    float* const panel = panels + j / kPanel * kPanel * units + j % kPanel;
    if (j < keys) {
      read_operand(row, reinterpret_cast<const T*>(k + j * stride), d);
      for (int64_t u = 0; u < units; ++u) panel[u * kPanel] = row[u];
    } else {
      for (int64_t u = 0; u < units; ++u) panel[u * kPanel] = 0.0f;
    }
  }
}

// Columns of v as the weight of a tile: panels of 32 features, a unit for each key or pair of them.
template <class T>
void pack_values(const uint8_t* v, int64_t stride, int64_t keys, int64_t d, float* panels,
                 float* row) {
  const int64_t units = units_of<T>(keys);
  for (int64_t u = 0; u < units; ++u) {
    float* unit = panels + u * kPanel;
    if constexpr (kPairs<T>) {
      uint16_t* const even = reinterpret_cast<uint16_t*>(row);
      uint16_t* const odd = even + round_up(d, kPanel);
      read_operand(row, reinterpret_cast<const T*>(v + 2 * u * stride), d);
      const bool last = 2 * u + 1 == keys;  // an incomplete pair
      const uint8_t* const next = v + (2 * u + (last ? 0 : 1)) * stride;
      read_operand(reinterpret_cast<float*>(odd), reinterpret_cast<const T*>(next), last ? 0 : d);
      for (int64_t i = 0; last && i < d; ++i) odd[i] = 0;
      for (int64_t p = 0; p < d; p += kPanel, unit += units * kPanel) {
        uint32_t* const pairs = reinterpret_cast<uint32_t*>(unit);
        for (int i = 0; i < kPanel; ++i) pairs[i] = even[p + i] | uint32_t{odd[p + i]} << 16;
      }
    } else {
      read_row(row, reinterpret_cast<const T*>(v + u * stride), d);
      for (int64_t p = 0; p < d; p += kPanel, unit += units * kPanel) {
        for (int i = 0; i < kPanel; i += Vec::kLanes) Vec::store(unit + i, Vec::load(row + p + i));
      }
    }
  }
}

// rows x outputs of c = x w^T (+ c), with `units` columns of x; w in panels.
template <Kind K>
void multiply_panels(const float* x, int64_t rows, const float* w, int64_t units, int64_t outputs,
                     float* c, int64_t c_stride, bool add) {
  const Shapes& shape = shapes_of<K>(rows);
  TileArgs args;
  args.panel_bytes = 0;
  args.units = args.stream_units = units;
  args.jump = args.next_step = 0;
  args.c_stride = c_stride;
  args.addend_stride = add ? c_stride : 0;
  for (int64_t p = 0; p < outputs; p += kPanel) {
    args.a = reinterpret_cast<const uint8_t*>(x);
    args.w = args.next = reinterpret_cast<const uint8_t*>(w + p * units);
    args.c = c + p;
    args.addend = add ? c + p : kZeros;
    const int64_t left = outputs - p < kPanel ? outputs - p : kPanel;
    run_tile(shape, args, 1, static_cast<int>((left + Vec::kLanes - 1) / Vec::kLanes));
  }
}

constexpr float kMasked = -3.4028235e38f;  // fp32's lowest

// What fills the last register's lanes beyond the keys counts for nothing, even where every key is
// masked.
void end_mask(float* mask, int64_t keys) {
  for (int64_t i = keys; i < round_up(keys, kPanel); ++i) mask[i] = -__builtin_inff();
}

FG_INLINE float largest_of(F lanes) {
  float value[Vec::kLanes];
  Vec::store(value, lanes);
  for (int i = 1; i < Vec::kLanes; ++i) value[0] = value[i] > value[0] ? value[i] : value[0];
  return value[0];
}

// p = exp(scale p + mask - max) over one block of keys, exactly 0 below e^-87 of the largest.
// `most`, from kMasked, and `total` run over the blocks; returns by how much what came before has
// to shrink. (Milakov & Gimelshein 2018, arXiv 1805.02867.)
float soften(float* p, const float* mask, int64_t keys, float scale, float* most, float* total) {
  const int64_t end = round_up(keys, Vec::kLanes);
  F largest = Vec::set(*most);
  for (int64_t i = 0; i < end; i += Vec::kLanes) {
    const F x = Vec::fma(Vec::load(p + i), Vec::set(scale), Vec::load(mask + i));
    Vec::store(p + i, x);
    largest = Vec::max(x, largest);
  }
  const float before = *most;
  *most = largest_of(largest);
  const F shift = Vec::set(*most), floor = exp(Vec::set(-87.0f));
  F sum = Vec::zero();
  for (int64_t i = 0; i < end; i += Vec::kLanes) {
    // Not max(e, 0): a NaN has to stay one.
    const F e = Vec::max(Vec::zero(), Vec::sub(exp(Vec::sub(Vec::load(p + i), shift)), floor));
    Vec::store(p + i, e);
    sum = Vec::add(sum, e);
  }
  float factor[Vec::kLanes];
  Vec::store(factor, exp(Vec::sub(Vec::set(before), shift)));
  *total = __builtin_fmaf(*total, factor[0], Vec::sum(sum));
  return factor[0];
}

}  // namespace
}  // namespace finegates
