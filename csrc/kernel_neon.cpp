// Registers of NEON (aarch64, where it is always there).
#include <arm_neon.h>

#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

struct Vec : ScalarChunks {
  static constexpr int kLanes = 4;
  static constexpr bool kHasDot = false;
  using F = float32x4_t;

  // 6 rows by 4 vectors: 24 accumulators, 4 weights, 1 broadcast of 32 registers.
  static constexpr int tile_rows(Kind kind) { return kind == Kind::kF32 ? 6 : 5; }
  static constexpr Group group(Kind, int, Tune) { return {1, Ahead::kNothing, 0}; }
  static constexpr int vecs(int rows) { return rows <= 2 ? 8 : 4; }
  // Units summed in one chain before they join the total: 384 products.
  static constexpr int chain(Kind kind) { return kUnits / operand_units(kind); }

  static F zero() { return vdupq_n_f32(0.0f); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F load(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void store(uint16_t* p, F x) {
    float lanes[kLanes];
    vst1q_f32(lanes, x);
    for (int i = 0; i < kLanes; ++i) narrow(lanes[i], p + i);
  }
  static float sum(F x) { return vaddvq_f32(x); }
  static float largest(F x) { return vmaxvq_f32(x); }
  static F broadcast(const float* p) { return vld1q_dup_f32(p); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F power_of_two(F shifted) {
    return vreinterpretq_f32_u32(
        vaddq_u32(vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23), vdupq_n_u32(0x3f800000u)));
  }
  static F low_half(F pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16));
  }
  static F high_half(F pairs) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs), vdupq_n_u32(0xffff0000u)));
  }

  // Columns 0 to 3 of four outputs: sign and magnitude to fp32.
  static F i8_floats(F four, int part) {
    const uint8x16_t bytes = vreinterpretq_u8_f32(four);
    const uint8x8_t pairs = part < 2 ? vget_low_u8(bytes) : vget_high_u8(bytes);
    const uint32x4_t lanes = vreinterpretq_u32_u16(vshll_n_u8(pairs, 8));
    const uint32x4_t top = part % 2 == 0 ? vshlq_n_u32(lanes, 16) : lanes;
    const uint32x4_t magnitude = vandq_u32(vshrq_n_u32(top, 24), vdupq_n_u32(127));
    const uint32x4_t sign = vandq_u32(top, vdupq_n_u32(0x80000000u));
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(vcvtq_f32_u32(magnitude)), sign));
  }
};

}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kNeonKernels = make_kernels("neon");
}  // namespace finegates
