// Gather and scatter of chunks without vector instructions, for the ISA files that have nothing
// better. Included inside an anonymous namespace's file, like kernel_body.h.
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

template <class In>
float* gather_scalar(float* out, const In* in, const uint16_t* masks, int64_t length) {
  for (int64_t at = 0; at < length; at += kChunk) {
    for (unsigned mask = *masks++; mask != 0; mask &= mask - 1) {
      *out++ = widen(in[at + __builtin_ctz(mask)]);
    }
  }
  return out;
}

// Sixteen outputs and where the kept ones among them come from.
struct ScalarSpread {
  unsigned mask;
  int kept;
};
struct ScalarChunk {
  float value[kChunk];
};

inline ScalarChunk expand_scalar(const float* compact, ScalarSpread spread) {
  ScalarChunk out;
  compact += spread.kept;
  for (int i = 0; i < kChunk; ++i) out.value[i] = spread.mask >> i & 1 ? *compact++ : 0.0f;
  return out;
}

template <class T>
void write_scalar(T* y, const ScalarChunk& chunk, int valid) {
  for (int i = 0; i < valid; ++i) narrow(chunk.value[i], y + i);
}

template <class T>
void add_write_scalar(T* y, const ScalarChunk& chunk, const T* residual, int valid) {
  for (int i = 0; i < valid; ++i) narrow(chunk.value[i] + widen(residual[i]), y + i);
}

}  // namespace
}  // namespace finegates
