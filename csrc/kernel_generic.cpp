// Portable level: GNU vector extensions over 128 bits, which any target lowers to what it has.
#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

struct Vec : ScalarChunks {
  static constexpr int kLanes = 4;
  static constexpr bool kHasDot = false;
  typedef float F __attribute__((vector_size(16)));
  typedef float Loose __attribute__((vector_size(16), aligned(4), may_alias));
  typedef uint32_t U __attribute__((vector_size(16)));

  static constexpr int tile_rows(Kind) { return 4; }
  static constexpr Group group(Kind, int, Tune) { return {1, Ahead::kNothing, 0}; }
  static constexpr int vecs(int rows) { return rows <= 1 ? 8 : rows <= 2 ? 4 : 2; }
  // Units summed in one chain before they join the total; short, as nothing is fused here.
  static constexpr int chain(Kind kind) { return kind == Kind::kI8 ? 16 : 64; }

  static F zero() { return F{}; }
  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
  static void store(float* p, F x) { *reinterpret_cast<Loose*>(p) = x; }
  static F load(const uint16_t* p) { return F{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
  static void store(uint16_t* p, F x) {
    for (int i = 0; i < kLanes; ++i) narrow(x[i], p + i);
  }
  static float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
  static float largest(F x) {
    const F pairs = max(x, F{x[2], x[3], x[0], x[1]});
    return pairs[0] > pairs[1] ? pairs[0] : pairs[1];
  }
  static F broadcast(const float* p) { return set(*p); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  // The second operand where either is NaN.
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F a) { return F(U(a) & 0x7fffffffu); }
  static F power_of_two(F shifted) { return F((U(shifted) << 23) + 0x3f800000u); }
  static F low_half(F pairs) { return F(U(pairs) << 16); }
  static F high_half(F pairs) { return F(U(pairs) & 0xffff0000u); }

  // Bytes 2p and 2p + 1 of four outputs' pairs: sign and magnitude to fp32.
  static F i8_floats(F four, int part) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&four) + part / 2 * 8 + part % 2;
    F out;
    for (int i = 0; i < 4; ++i) {
      const float magnitude = static_cast<float>(bytes[2 * i] & 127);
      out[i] = bytes[2 * i] & 128 ? -magnitude : magnitude;
    }
    return out;
  }
};

}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kGenericKernels = make_kernels("generic");
}  // namespace finegates
