// Gather and scatter of chunks without vector instructions, for the ISA files that have nothing
// better. Under the rules of kernel_body.h.
#pragma once

#include "layout.h"

namespace finegates {
namespace {

inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float widen(float x) { return x; }

// Round to nearest even; a NaN stays a NaN.
inline void narrow(float x, uint16_t* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *out = static_cast<uint16_t>(nan ? (bits >> 16 | 0x40u)
                                   : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, float* out) { *out = x; }

// What Vec inherits; a level hides what it does better.
struct ScalarChunks {
  // Sixteen outputs and where the kept ones among them come from.
  struct Spread {
    unsigned mask;
    int kept;
  };
  struct Chunk {
    float value[kChunk];
  };

  template <class In>
  static float* gather(float* out, const In* in, const uint16_t* masks, int64_t length) {
    for (int64_t at = 0; at < length; at += kChunk) {
      for (unsigned mask = *masks++; mask != 0; mask &= mask - 1) {
        *out++ = widen(in[at + __builtin_ctz(mask)]);
      }
    }
    return out;
  }

  // Columns of 16 rows, `stride` bytes apart, as rows, kPanel apart.
  static void transpose(float* out, const uint8_t* in, int64_t stride, int64_t columns) {
    for (int r = 0; r < kChunk; ++r) {
      const float* const row = reinterpret_cast<const float*>(in + r * stride);
      for (int64_t c = 0; c < columns; ++c) out[c * kPanel + r] = row[c];
    }
  }

  static Spread spread(unsigned mask, int kept) { return {mask, kept}; }
  static const float* load_panel(const float* c) { return c; }
  static Chunk expand(const float* panel, Spread spread) {
    Chunk out;
    panel += spread.kept;
    for (int i = 0; i < kChunk; ++i) out.value[i] = spread.mask >> i & 1 ? *panel++ : 0.0f;
    return out;
  }

  template <class T>
  static void write(T* y, const Chunk& chunk, int valid) {
    for (int i = 0; i < valid; ++i) narrow(chunk.value[i], y + i);
  }
  template <class T>
  static void write_pair(T* y, const Chunk& a, const Chunk& b, int valid) {
    write(y, a, kChunk);
    write(y + kChunk, b, valid);
  }
  template <class T>
  static void add_write(T* y, const Chunk& chunk, const T* residual, int valid) {
    for (int i = 0; i < valid; ++i) narrow(chunk.value[i] + widen(residual[i]), y + i);
  }
};

}  // namespace
}  // namespace finegates
