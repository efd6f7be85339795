// Registers of AVX2 with FMA.
#include <immintrin.h>

#include "kernels.h"
#include "scalar_chunks.h"

namespace finegates {
namespace {

// For each 8 bits of a mask: where its set bits are, and how many lie below each.
struct Order {
  uint8_t compress[256][8], expand[256][8];
  constexpr Order() : compress(), expand() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        expand[bits][i] = static_cast<uint8_t>(count);
        if (bits >> i & 1) compress[bits][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr Order kOrder;

struct Vec : ScalarChunks {
  static constexpr int kLanes = 8;
  static constexpr bool kHasDot = false;
  using F = __m256;

  // 6 rows by 2 vectors: 12 accumulators, 2 weights, 1 broadcast of 16 registers.
  static constexpr int tile_rows(Kind kind) { return kind == Kind::kF32 ? 6 : 5; }
  static constexpr Group group(Kind kind, int rows, Tune) {
    return {rows <= 1 ? 2 : 1, kind == Kind::kI8 ? Ahead::kEveryLine : Ahead::kOneInEight, 4096};
  }
  static constexpr int vecs(int rows) { return rows <= 2 ? 4 : 2; }
  // Units summed in one chain before they join the total: at most 384 products, and 24 KB of
  // weights, which stay in L1 while all rows meet them in two halves of a panel.
  static constexpr int chain(Kind kind) {
    return kind == Kind::kF32 ? kUnits / 2 : kUnits / operand_units(kind);
  }

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F load(const uint16_t* p) { return load8(p); }
  static void store(uint16_t* p, F x) { store8(p, x); }
  static float sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float largest(F x) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
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

  // Only 8 lanes and no compress: a permutation looked up by 8 bits of the mask.
  template <class In>
  static float* gather(float* out, const In* in, const uint16_t* masks, int64_t length) {
    for (; length >= kChunk; length -= kChunk, in += kChunk, ++masks) {
      for (int half = 0; half < 2; ++half) {
        const unsigned bits = *masks >> (8 * half) & 255;
        const __m256i from = indices(kOrder.compress[bits]);
        store(out, _mm256_permutevar8x32_ps(load8(in + 8 * half), from));
        out += __builtin_popcount(bits);
      }
    }
    return ScalarChunks::gather(out, in, masks, length);
  }

  struct Chunk {
    F half[2];
  };
  static Chunk expand(const float* panel, Spread spread) {
    const unsigned low = spread.mask & 255, high = spread.mask >> 8;
    panel += spread.kept;
    return {{expand8(panel, low), expand8(panel + __builtin_popcount(low), high)}};
  }
  template <class T>
  static void write(T* y, const Chunk& chunk, int valid) {
    if (valid < kChunk) return ScalarChunks::write(y, spill(chunk), valid);
    store8(y, chunk.half[0]);
    store8(y + 8, chunk.half[1]);
  }
  template <class T>
  static void write_pair(T* y, const Chunk& a, const Chunk& b, int valid) {
    write(y, a, kChunk);
    write(y + kChunk, b, valid);
  }
  template <class T>
  static void add_write(T* y, const Chunk& chunk, const T* residual, int valid) {
    if (valid < kChunk) return ScalarChunks::add_write(y, spill(chunk), residual, valid);
    store8(y, add(chunk.half[0], load8(residual)));
    store8(y + 8, add(chunk.half[1], load8(residual + 8)));
  }

 private:
  static __m256i indices(const uint8_t* eight) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
  }
  static F expand8(const float* from, unsigned bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    const F kept = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes));
    return _mm256_and_ps(kept, _mm256_permutevar8x32_ps(load(from), indices(kOrder.expand[bits])));
  }
  static F load8(const float* p) { return load(p); }
  static F load8(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store8(float* p, F x) { store(p, x); }
  static void store8(uint16_t* p, F x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static ScalarChunks::Chunk spill(const Chunk& chunk) {
    ScalarChunks::Chunk out;
    store(out.value, chunk.half[0]);
    store(out.value + 8, chunk.half[1]);
    return out;
  }
};

}  // namespace
}  // namespace finegates

#include "kernel_body.h"

namespace finegates {
const Kernels kAvx2Kernels = make_kernels("avx2");
}  // namespace finegates
