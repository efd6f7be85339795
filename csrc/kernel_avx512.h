// Registers of AVX-512 (F, BW, DQ, VL). kDot adds vdpbf16ps and VBMI2's 16-bit compress.
#include <immintrin.h>

#include "kernels.h"

namespace finegates {
namespace {

// The two bytes of the bf16 of 0 to 127.
struct Bf16Table {
  uint8_t low[128], high[128];
  constexpr Bf16Table() : low(), high() {
    for (int i = 1; i < 128; ++i) {
      int exponent = 0;
      while (i >> (exponent + 1) != 0) ++exponent;
      const int bits = (127 + exponent) << 7 | ((i << 7 >> exponent) & 127);
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
alignas(64) constexpr Bf16Table kBf16;

template <bool kDot>
struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr bool kHasDot = kDot;
  using F = __m512;

  // 28 accumulators, 2 weights, 1 broadcast of 32 registers; widened weights take two more.
  static constexpr int tile_rows(Kind kind) {
    return kind == Kind::kF32 || kind == Kind::kDot ? 14 : kind == Kind::kI8Dot ? 10 : 12;
  }
  // FMA takes 4 cycles and dot 6 at two a cycle: 8 to 12 accumulators at the least.
  // int8 needs registers to widen in, as bf16 does under fp32 x, and computes longer on a line than
  // the hardware looks ahead; on a Zen 5 so does all else from two rows on.
  static constexpr Group group(Kind kind, int rows, Tune tune) {
    const bool int8 = kind == Kind::kI8 || kind == Kind::kI8Dot;
    if (int8) return {rows <= 2 ? 2 : 1, Ahead::kEveryLine, 4096};
    if (tune == Tune::kZen4 || rows == 1) {
      return {rows <= 2 ? 4 : rows <= 4 ? 3 : rows <= 6 ? 2 : 1, Ahead::kOneInEight, 4096};
    }
    const bool three = (rows == 3 || rows == 4) && kind != Kind::kWide;
    return {three ? 3 : rows <= 6 ? 2 : 1, Ahead::kEveryLine, 2048};
  }
  static constexpr int vecs(int) { return 2; }
  // Units summed in one chain before they join the total: 384 products, or pairs.
  static constexpr int chain(Kind kind) { return kUnits / operand_units(kind); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F load(const uint16_t* p) { return load16(p, kChunk); }
  static void store(uint16_t* p, F x) { store16(p, x, kChunk); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  // One unit of an operand, which may have been written as two bf16.
  typedef float Unit __attribute__((may_alias));
  static F broadcast(const float* p) { return _mm512_set1_ps(*reinterpret_cast<const Unit*>(p)); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand where either is NaN.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F power_of_two(F shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23),
                                                _mm512_set1_epi32(0x3f800000)));
  }
  static F low_half(F pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
  }
  static F high_half(F pairs) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(0xffff0000)));
  }
  // Columns 0 to 3 of each output: sign and magnitude to fp32.
  static F i8_floats(F four, int part) {
    const __m512i bytes = _mm512_castps_si512(four);
    const __m512i lanes =
        part < 2 ? _mm512_unpacklo_epi8(bytes, bytes) : _mm512_unpackhi_epi8(bytes, bytes);
    const __m512i top = part % 2 == 0 ? _mm512_slli_epi32(lanes, 16) : lanes;
    const __m512i magnitude = _mm512_and_si512(_mm512_srli_epi32(top, 24), _mm512_set1_epi32(127));
    return _mm512_or_ps(_mm512_cvtepi32_ps(magnitude),
                        _mm512_and_ps(_mm512_castsi512_ps(top), _mm512_set1_ps(-0.0f)));
  }
#ifdef __AVX512BF16__
  // Pairs of bf16 from sign and magnitude: both bytes of |w| come from tables of 128 entries.
  static F i8_pairs(F four, int part) {
    const __m512i bytes = _mm512_castps_si512(four);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBf16.low), bytes,
                                                 _mm512_load_si512(kBf16.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(kBf16.high), bytes,
                                                  _mm512_load_si512(kBf16.high + 64));
    // high | (bytes & 0x80)
    const __m512i top = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(-128), 0xf8);
    return _mm512_castsi512_ps(part == 0 ? _mm512_unpacklo_epi8(low, top)
                                         : _mm512_unpackhi_epi8(low, top));
  }
  static F dot(F w, F x, F acc) { return _mm512_dpbf16_ps(acc, (__m512bh)(w), (__m512bh)(x)); }
#endif

  static F load16(const float* p, int valid) {
    return valid >= kChunk ? _mm512_loadu_ps(p)
                           : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << valid) - 1), p);
  }
  static __m256i load_half(const uint16_t* p, int valid) {
    return valid >= kChunk ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                           : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << valid) - 1), p);
  }
  static F load16(const uint16_t* p, int valid) {
    const __m512i wide = _mm512_cvtepu16_epi32(load_half(p, valid));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store16(float* p, F x, int valid) {
    if (valid >= kChunk) return _mm512_storeu_ps(p, x);
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << valid) - 1), x);
  }
  static void store16(uint16_t* p, F x, int valid) {
#ifdef __AVX512BF16__
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
    store_half(p, half, valid);
  }
  static void store_half(uint16_t* p, __m256i half, int valid) {
    if (valid >= kChunk) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << valid) - 1), half);
  }

  // Columns of 16 rows, `stride` bytes apart, as rows, kPanel apart: at step s, lanes with bit s of
  // one row change places with lanes without it of the row s further on.
  static void transpose(float* out, const uint8_t* in, int64_t stride, int64_t columns) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    F value[kChunk];
#pragma GCC unroll 16
    for (int r = 0; r < kChunk; ++r)
      value[r] = load(reinterpret_cast<const float*>(in + r * stride));
#pragma GCC unroll 4
    for (int s = 1; s < kChunk; s *= 2) {
      const __m512i step = _mm512_set1_epi32(s);
      const __mmask16 set = _mm512_test_epi32_mask(lane, step);
      const __m512i low = _mm512_mask_add_epi32(lane, set, lane, _mm512_set1_epi32(kChunk - s));
      const __m512i high =
          _mm512_mask_add_epi32(_mm512_add_epi32(lane, step), set, lane, _mm512_set1_epi32(kChunk));
#pragma GCC unroll 16
      for (int r = 0; r < kChunk; ++r) {
        if (r & s) continue;
        const F first = value[r], second = value[r + s];
        value[r] = _mm512_permutex2var_ps(first, low, second);
        value[r + s] = _mm512_permutex2var_ps(first, high, second);
      }
    }
#pragma GCC unroll 16
    for (int c = 0; c < kChunk; ++c) {
      if (c < columns) store(out + c * kPanel, value[c]);
    }
  }

  // Compress in a register and store all 16 lanes: vpcompressd to memory is microcoded on Zen 4.
  template <class In>
  static float* gather(float* out, const In* in, const uint16_t* masks, int64_t length) {
    for (; length >= kChunk; length -= kChunk, in += kChunk, ++masks) {
      _mm512_storeu_ps(out, _mm512_maskz_compress_ps(*masks, load16(in, kChunk)));
      out += __builtin_popcount(*masks);
    }
    if (length == 0) return out;
    const F tail = load16(in, static_cast<int>(length));
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(*masks, tail));
    return out + __builtin_popcount(*masks);
  }
#ifdef __AVX512VBMI2__
  static uint16_t* gather(uint16_t* out, const uint16_t* in, const uint16_t* masks,
                          int64_t length) {
    for (; length >= 2 * kChunk; length -= 2 * kChunk, in += 2 * kChunk, masks += 2) {
      uint32_t mask;
      __builtin_memcpy(&mask, masks, sizeof(mask));
      _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, _mm512_loadu_si512(in)));
      out += __builtin_popcount(mask);
    }
    if (length == 0) return out;
    const __mmask32 mask = masks[0] | (length > kChunk ? uint32_t{masks[1]} << 16 : 0u);
    const __m512i tail = _mm512_maskz_loadu_epi16((__mmask32{1} << length) - 1, in);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, tail));
    return out + __builtin_popcount(mask);
  }
#endif

  // One permutation of the panel's two registers expands any 16 outputs. (An unaligned load and
  // vexpandps cost 12 cycles a chunk: the load spans two stores and cannot be forwarded.)
  struct Spread {
    __m512i from;
    __mmask16 mask;
  };
  static Spread spread(unsigned mask, int kept) {
    const __m512i order =
        _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(kept));
    const __mmask16 bits = static_cast<__mmask16>(mask);
    return {_mm512_maskz_expand_epi32(bits, order), bits};
  }
  struct Panel {
    F low, high;
  };
  static Panel load_panel(const float* c) { return {load(c), load(c + kLanes)}; }
  struct Chunk {
    F value;
    __mmask16 kept;
  };
  static Chunk expand(const Panel& panel, const Spread& s) {
    return {_mm512_maskz_permutex2var_ps(s.mask, panel.low, s.from, panel.high), s.mask};
  }
  template <class T>
  static void write(T* y, const Chunk& chunk, int valid) {
    store16(y, chunk.value, valid);
  }
  static void write_pair(float* y, const Chunk& a, const Chunk& b, int valid) {
    store16(y, a.value, kChunk);
    store16(y + kChunk, b.value, valid);
  }
  static void write_pair(uint16_t* y, const Chunk& a, const Chunk& b, int valid) {
#ifdef __AVX512BF16__
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.value, a.value);
    if (valid >= kChunk) return _mm512_storeu_si512(y, both);
    _mm512_mask_storeu_epi16(y, (__mmask32{1} << (kChunk + valid)) - 1, both);
#else
    store16(y, a.value, kChunk);
    store16(y + kChunk, b.value, valid);
#endif
  }
  template <class T>
  static void add_write(T* y, const Chunk& chunk, const T* residual, int valid) {
    const F sum = _mm512_add_ps(chunk.value, load16(residual, valid));
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == 2) {  // rounding flushes denormals: a removed row's pass it by
      const __m256bh before = (__m256bh)load_half(residual, valid);
      return store_half(y, (__m256i)_mm512_mask_cvtneps_pbh(before, chunk.kept, sum), valid);
    }
#endif
    store16(y, sum, valid);
  }
};

}  // namespace
}  // namespace finegates
