// What both attentions share: rows in and out of fp32, both products on the tiles of the matrix
// product, with keys and values packed as weights, and the softmax between them. Part of
// kernel_body.h, under its rules.
#pragma once

#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

constexpr int kPRow = row_stride(Kind::kF32) / 4;  // floats from row to row of a tile's operand

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Widens a row; up to the next multiple of kPanel it ends in zeros.
template <class T>
void read_row(float* out, const T* in, int64_t length) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= length; i += Vec::kLanes) Vec::store(out + i, Vec::load(in + i));
  for (; i < length; ++i) out[i] = widen(in[i]);
  for (; i < round_up(length, kPanel); ++i) out[i] = 0.0f;
}

// Rounds a row; `out` may be `in`, as it is never ahead of what is read.
template <class T>
void write_row(T* out, const float* in, int64_t length) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= length; i += Vec::kLanes) Vec::store(out + i, Vec::load(in + i));
  for (; i < length; ++i) narrow(in[i], out + i);
}

// bf16 is multiplied in pairs where the level has a dot product, and widened to fp32 elsewhere.
template <class T>
constexpr bool kPairs = sizeof(T) == 2 && Vec::kHasDot;
template <class T>
constexpr Kind kAttentionKind = kPairs<T> ? Kind::kDot : Kind::kF32;

template <class T>
constexpr int64_t units_of(int64_t length) {
  return kPairs<T> ? (length + 1) / 2 : length;
}

// A row as a tile's operand: zeros up to the next multiple of kPanel.
template <class T>
void read_operand(float* out, const T* in, int64_t length) {
  if constexpr (kPairs<T>) {
    typedef uint16_t Half __attribute__((may_alias));
    Half* const pairs = reinterpret_cast<Half*>(out);
    int64_t i = 0;
    for (; i + kPanel <= length; i += kPanel) __builtin_memcpy(pairs + i, in + i, 2 * kPanel);
    for (; i < length; ++i) pairs[i] = in[i];
    for (; i < round_up(length, kPanel); ++i) pairs[i] = 0;
  } else {
    read_row(out, in, length);
  }
}

// Rows of k, `stride` bytes apart, as the weight of a tile: panels of 32 keys, a unit for each of d
// features or pair of them.
template <class T>
void pack_keys(const uint8_t* k, int64_t stride, int64_t keys, int64_t d, float* panels) {
  constexpr int64_t kFeatures = kPairs<T> ? 2 * kChunk : kChunk;
  constexpr bool kAsItIs = sizeof(T) == sizeof(float) || kPairs<T>;  // whole chunks need no copy
  const int64_t units = units_of<T>(d);
  alignas(kAlign) float rows[kChunk + 1][kChunk];  // the last one for what read_operand() pads
  for (int64_t j = 0; j < round_up(keys, kPanel); j += kChunk) {
    float* const panel = panels + j / kPanel * kPanel * units + j % kPanel;
    for (int64_t at = 0; at < d; at += kFeatures) {
      const int64_t features = d - at < kFeatures ? d - at : kFeatures;
      float* const out = panel + units_of<T>(at) * kPanel;
      const uint8_t* const in = k + j * stride + at * sizeof(T);
      if (kAsItIs && j + kChunk <= keys && features == kFeatures) {
        Vec::transpose(out, in, stride, kChunk);
        continue;
      }
      for (int64_t i = 0; i < kChunk; ++i) {
        if (j + i < keys) {
          read_operand(rows[i], reinterpret_cast<const T*>(in + i * stride), features);
        } else {
          for (float& value : rows[i]) value = 0.0f;
        }
      }
      Vec::transpose(out, reinterpret_cast<const uint8_t*>(rows), sizeof(rows[0]),
                     units_of<T>(features));
    }
  }
}

// Columns of v as the weight of a tile: panels of 32 features, a unit for each key or pair of them.
template <class T>
void pack_values(const uint8_t* v, int64_t stride, int64_t keys, int64_t d, float* panels) {
  const int64_t units = units_of<T>(keys);
  for (int64_t u = 0; u < units; ++u) {
    float* unit = panels + u * kPanel;
    for (int64_t at = 0; at < d; at += kPanel, unit += units * kPanel) {
      const int64_t features = d - at < kPanel ? d - at : kPanel;
      const auto row = [&](int64_t key) {
        return reinterpret_cast<const T*>(v + key * stride) + at;
      };
      if constexpr (kPairs<T>) {
        uint16_t even[kPanel], odd[kPanel] = {};
        read_operand(reinterpret_cast<float*>(even), row(2 * u), features);
        if (2 * u + 1 < keys) {
          read_operand(reinterpret_cast<float*>(odd), row(2 * u + 1), features);
        }
        uint32_t* const pairs = reinterpret_cast<uint32_t*>(unit);
        for (int i = 0; i < kPanel; ++i) pairs[i] = even[i] | uint32_t{odd[i]} << 16;
      } else {
        read_row(unit, row(u), features);
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
  args.jump = 0;
  args.next = 0;  // a tile alone brings nothing
  args.next_step = 0;
  args.c_stride = c_stride;
  args.addend_stride = add ? c_stride : 0;
  for (int64_t p = 0; p < outputs; p += kPanel) {
    args.a = reinterpret_cast<const uint8_t*>(x);
    args.w = reinterpret_cast<const uint8_t*>(w + p * units);
    args.c = c + p;
    args.addend = add ? c + p : kZeros;
    const int64_t left = outputs - p < kPanel ? outputs - p : kPanel;
    run_tile(shape, args, static_cast<int>((left + Vec::kLanes - 1) / Vec::kLanes), true);
  }
}

constexpr float kMasked = -3.4028235e38f;  // fp32's lowest

// What fills the last register's lanes beyond the keys counts for nothing, even where every key is
// masked.
void end_mask(float* mask, int64_t keys) {
  for (int64_t i = keys; i < round_up(keys, kPanel); ++i) mask[i] = -__builtin_inff();
}

// The softmax of a row runs over blocks of keys: (1) p = log2(e) (scale p + mask), where the mask
// comes times log2(e), and the new maximum; (2) p = 2^(p - maximum), and its sum; (3) what came
// before shrinks. (Milakov & Gimelshein 2018, arXiv 1805.02867.)
FG_INLINE float raise_maximum(float* p, const float* mask, int64_t keys, float scale,
                              float maximum) {
  F largest = Vec::set(maximum);
  for (int64_t i = 0; i < keys; i += Vec::kLanes) {
    const F x = Vec::fma(Vec::load(p + i), Vec::set(scale * kLog2E), Vec::load(mask + i));
    Vec::store(p + i, x);
    largest = Vec::max(x, largest);
  }
  return Vec::largest(largest);
}

// Exactly 0 below 2^-126.5 of the largest; bf16 if kShort.
template <bool kShort>
FG_INLINE float exponentials(float* p, int64_t keys, float maximum) {
  F sum = Vec::zero();
  for (int64_t i = 0; i < keys; i += Vec::kLanes) {
    const F e = exp2(Vec::sub(Vec::load(p + i), Vec::set(maximum)));
    if constexpr (kShort) {  // never ahead of what is read
      Vec::store(reinterpret_cast<uint16_t*>(p) + i, e);
    } else {
      Vec::store(p + i, e);
    }
    sum = Vec::add(sum, e);
  }
  return Vec::sum(sum);
}

FG_INLINE float shrinkage(float before, float maximum) {
  float lanes[Vec::kLanes];
  Vec::store(lanes, exp2(Vec::set(before - maximum)));
  return lanes[0];
}

}  // namespace
}  // namespace finegates
