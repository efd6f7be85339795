#include "probe.h"

#include <time.h>

#include <cstring>

#include "isa.h"
#include "layout.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace finegates {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);  // a busy machine preempts
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

constexpr long kRounds = 4000000;
constexpr double kChains = 15;

// Fifteen independent chains, as named variables so that they stay in registers. The instruction
// is inline assembly: these functions need no compiler flags of their own.
#define CHAINS(type, zero, ONE)                                                                 \
  const type x = zero;                                                                          \
  type a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, a8 = x, a9 = x, a10 = x, \
       a11 = x, a12 = x, a13 = x, a14 = x;                                                      \
  const double begin = now();                                                                   \
  for (long i = 0; i < kRounds; ++i) {                                                          \
    ONE(a0);                                                                                    \
    ONE(a1);                                                                                    \
    ONE(a2);                                                                                    \
    ONE(a3);                                                                                    \
    ONE(a4);                                                                                    \
    ONE(a5);                                                                                    \
    ONE(a6);                                                                                    \
    ONE(a7);                                                                                    \
    ONE(a8);                                                                                    \
    ONE(a9);                                                                                    \
    ONE(a10);                                                                                   \
    ONE(a11);                                                                                   \
    ONE(a12);                                                                                   \
    ONE(a13);                                                                                   \
    ONE(a14);                                                                                   \
  }                                                                                             \
  return kRounds * kChains / (now() - begin)

#if defined(__x86_64__)
#define FMA(a) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(a) : "v"(x))
#define DOT(a) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(a) : "v"(x))

__attribute__((target("avx2,fma"))) double fma_256() { CHAINS(__m256, _mm256_setzero_ps(), FMA); }
__attribute__((target("avx512f"))) double fma_512() { CHAINS(__m512, _mm512_setzero_ps(), FMA); }
__attribute__((target("avx512f,avx512bf16"))) double dot_512() {
  CHAINS(__m512, _mm512_setzero_ps(), DOT);
}
#elif defined(__aarch64__)
#define FMA(a) asm volatile("fmla %0.4s, %1.4s, %1.4s" : "+w"(a) : "w"(x))

double fma_128() { CHAINS(float32x4_t, vdupq_n_f32(0.0f), FMA); }
#endif

// Bytes a second of one pass over the lines as some streams at once, prefetched so many lines
// ahead. One word of each line is loaded, the least that moves it, so that nothing else counts.
template <int kStreams>
double read(const uint8_t* data, size_t lines, size_t ahead) {
  const size_t length = lines / kStreams;
  const double begin = now();
  for (size_t i = 0; i < length; ++i) {
    for (int s = 0; s < kStreams; ++s) {
      const uint8_t* line = data + (s * length + i) * kAlign;
      __builtin_prefetch(line + ahead * kAlign);
      asm volatile("" ::"r"(*reinterpret_cast<const uint64_t*>(line)));
    }
  }
  return length * kStreams * kAlign / (now() - begin);
}

}  // namespace

double probe_flops(Arithmetic arithmetic) {
  [[maybe_unused]] const char* level = kernels().name;
  [[maybe_unused]] const bool dot = arithmetic == Arithmetic::kDot;
#if defined(__x86_64__)
  if (dot && std::strcmp(level, "avx512bf16") == 0) return 64 * dot_512();
  if (std::strncmp(level, "avx512", 6) == 0) return 32 * fma_512();
  if (std::strcmp(level, "avx2") == 0) return 16 * fma_256();
#elif defined(__aarch64__)
  if (std::strcmp(level, "neon") == 0) return 8 * fma_128();
#endif
  return 0;
}

double probe_read(const uint8_t* data, size_t bytes, int streams, size_t ahead) {
  const size_t lines = bytes / kAlign;
  if (streams == 1) return read<1>(data, lines, ahead);
  if (streams == 2) return read<2>(data, lines, ahead);
  return read<4>(data, lines, ahead);
}

}  // namespace finegates
