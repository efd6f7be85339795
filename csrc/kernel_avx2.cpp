// Registers of AVX2 with FMA.
#include <immintrin.h>

#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr bool kHasDot = false;
  using F = __m256;

  // 6 rows by 2 vectors: 12 accumulators, 2 weights, 1 broadcast of 16 registers.
  static constexpr int tile_rows(Kind kind) { return kind == Kind::kF32 ? 6 : 5; }
  static constexpr int group(Kind, int rows) { return rows <= 1 ? 2 : 1; }
  static constexpr int vecs(int rows) { return rows <= 2 ? 4 : 2; }
  // Units summed in one chain before they join the total: 384 products.
  static constexpr int chain(Kind kind) {
    return kind == Kind::kI8 ? kUnits / 4 : kind == Kind::kWide ? kUnits / 2 : kUnits;
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // The second operand where either is NaN.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F power_of_two(F shifted) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                                                _mm256_set1_epi32(0x3f800000)));
  }
  static F low_half(F pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
  }
  static F high_half(F pairs) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(0xffff0000)));
  }

  // Columns 0 to 3 of each output: sign and magnitude to fp32.
  static F i8_floats(F four, int part) {
    const __m256i bytes = _mm256_castps_si256(four);
    const __m256i lanes =
        part < 2 ? _mm256_unpacklo_epi8(bytes, bytes) : _mm256_unpackhi_epi8(bytes, bytes);
    const __m256i top = part % 2 == 0 ? _mm256_slli_epi32(lanes, 16) : lanes;
    const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi32(top, 24), _mm256_set1_epi32(127));
    return _mm256_or_ps(_mm256_cvtepi32_ps(magnitude),
                        _mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)));
  }

  template <class In>
  static float* gather(float* out, const In* in, const uint16_t* masks, int64_t length) {
    return gather_scalar(out, in, masks, length);
  }
  using Spread = ScalarSpread;
  static Spread spread(unsigned mask, int kept) { return {mask, kept}; }
  static const float* load_panel(const float* c) { return c; }
  static ScalarChunk expand(const float* panel, Spread spread) {
    return expand_scalar(panel, spread);
  }
  template <class T>
  static void write(T* y, const ScalarChunk& chunk, int valid) {
    write_scalar(y, chunk, valid);
  }
  template <class T>
  static void write_pair(T* y, const ScalarChunk& a, const ScalarChunk& b, int valid) {
    write_scalar(y, a, kChunk);
    write_scalar(y + kChunk, b, valid);
  }
  template <class T>
  static void add_write(T* y, const ScalarChunk& chunk, const T* residual, int valid) {
    add_write_scalar(y, chunk, residual, valid);
  }
};

}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kAvx2Kernels = make_kernels("avx2");
}  // namespace finegates
