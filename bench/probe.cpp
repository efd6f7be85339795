// Ceilings of one core: FMA, bf16 dot product, reading memory. Compiled by probe.py.
#include <immintrin.h>
#include <time.h>

#include <cstddef>
#include <cstdint>

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);  // a busy machine preempts
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

constexpr long kRounds = 4000000;

// Fifteen independent chains, as named variables so that they stay in registers.
#define ONE(instruction, a) asm volatile(instruction " %1, %1, %0" : "+v"(a) : "v"(x))
#define CHAINS(type, zero, instruction)                                                          \
  type x = zero, a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, a8 = x, a9 = x, \
       a10 = x, a11 = x, a12 = x, a13 = x, a14 = x;                                              \
  const double begin = now();                                                                    \
  for (long i = 0; i < kRounds; ++i) {                                                           \
    ONE(instruction, a0);                                                                        \
    ONE(instruction, a1);                                                                        \
    ONE(instruction, a2);                                                                        \
    ONE(instruction, a3);                                                                        \
    ONE(instruction, a4);                                                                        \
    ONE(instruction, a5);                                                                        \
    ONE(instruction, a6);                                                                        \
    ONE(instruction, a7);                                                                        \
    ONE(instruction, a8);                                                                        \
    ONE(instruction, a9);                                                                        \
    ONE(instruction, a10);                                                                       \
    ONE(instruction, a11);                                                                       \
    ONE(instruction, a12);                                                                       \
    ONE(instruction, a13);                                                                       \
    ONE(instruction, a14);                                                                       \
  }                                                                                              \
  const double seconds = now() - begin;

}  // namespace

extern "C" {

__attribute__((target("avx2,fma"))) double probe_fma_256() {
  CHAINS(__m256, _mm256_setzero_ps(), "vfmadd231ps")
  return kRounds * 15.0 * 16 / seconds;
}

__attribute__((target("avx512f"))) double probe_fma_512() {
  CHAINS(__m512, _mm512_setzero_ps(), "vfmadd231ps")
  return kRounds * 15.0 * 32 / seconds;
}

__attribute__((target("avx512f,avx512bf16"))) double probe_dot_512() {
  CHAINS(__m512, _mm512_setzero_ps(), "vdpbf16ps")
  return kRounds * 15.0 * 64 / seconds;
}

// Bytes a second over `bytes` at `data`.
double probe_read(const uint8_t* data, size_t bytes) {
  uint64_t sum[8] = {};
  const double begin = now();
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    const uint64_t* line = reinterpret_cast<const uint64_t*>(data + i);
    __builtin_prefetch(line + 512);
    for (int j = 0; j < 8; ++j) sum[j] += line[j];
  }
  const double seconds = now() - begin;
  asm volatile("" ::"m"(sum));
  return bytes / seconds;
}
}
