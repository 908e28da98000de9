// What the machine's multiply-add units reach on operands that never leave registers: the ceiling of every kernel made
// of products. ceiling.py compiles this for the machine it runs on and calls one loop per thread.
#if defined(__x86_64__)
#include <immintrin.h>
#define VECTOR_REGISTER "v"  // the constraint in inline assembly
#else
#define VECTOR_REGISTER "w"
#endif

namespace {

// Enough independent sums to cover the latency of a multiply-add, few enough to stay in registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));

}  // namespace

// Return the number of floating-point operations done.
extern "C" double float32_loop(long iterations) {
  Floats sums[kSums] = {}, a = Floats{} + 0.5f, b = Floats{} + 1e-3f;
  asm volatile("" : "+" VECTOR_REGISTER(a), "+" VECTOR_REGISTER(b));
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j)
    asm volatile("" : "+" VECTOR_REGISTER(sums[j]));  // or equal sums would be computed once
  for (long i = 0; i < iterations; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = sums[j] * a + b;
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) asm volatile("" ::VECTOR_REGISTER(sums[j]));
  return 2.0 * iterations * kSums * (kBytes / 4);
}

#if defined(__AVX512BF16__)
extern "C" double bfloat16_loop(long iterations) {
  __m512 sums[kSums] = {};
  __m512i a = _mm512_set1_epi32(0x3c003c00), b = a;
  asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) asm volatile("" : "+v"(sums[j]));
  for (long i = 0; i < iterations; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)a, (__m512bh)b);
#pragma GCC unroll 24
  for (int j = 0; j < kSums; ++j) asm volatile("" ::"v"(sums[j]));
  return 4.0 * iterations * kSums * 16;
}
#else  // operands are widened, then multiplied as float32
extern "C" double bfloat16_loop(long iterations) { return float32_loop(iterations); }
#endif
