// Arithmetic on vectors of float32 (elements.h) for matrix products and softmax: multiply-add, exp2, log, transpose.
#pragma once
#include "elements.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace selfforcing {
namespace SELFFORCING_ISA {

// 16 and 32 vector registers hold a 4 x 2 and an 8 x 2 tile of accumulators with room for the operands.
#if defined(__AVX512F__)
inline constexpr int kTileRows = 8;
#else
inline constexpr int kTileRows = 4;
#endif

SELFFORCING_INLINE Floats load(const float* from) { return Float32::widen(from); }
SELFFORCING_INLINE void store(float* to, Floats x) { Float32::narrow(to, x); }

// a * b + c and a * b - c, rounded once where the instruction set can.
SELFFORCING_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

SELFFORCING_INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmsub_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmsub_ps(a, b, c);
#else
  return a * b - c;
#endif
}

// b where one of them is NaN.
SELFFORCING_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Pairs of neighbouring lanes, each turned by its pair of cosine and sine: (x0 c - x1 s, x1 c + x0 s).
SELFFORCING_INLINE Floats rotate_pairs(Floats x, Floats turns) {
#if defined(__AVX512F__)
  return _mm512_fmaddsub_ps(x, _mm512_maskz_moveldup_ps(0xffff, turns),
                            swap_pairs(x) * reinterpret_cast<Floats>(_mm512_maskz_movehdup_ps(0xffff, turns)));
#elif defined(__FMA__)
  return _mm256_fmaddsub_ps(x, _mm256_moveldup_ps(turns),
                            swap_pairs(x) * reinterpret_cast<Floats>(_mm256_movehdup_ps(turns)));
#else
  typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
  const Ints even = reinterpret_cast<Ints>(Pairs{} + 0xffffffffu);
  const Floats swapped = swap_pairs(turns);
  return x * (even ? turns : swapped) + swap_pairs(x) * (even ? -swapped : turns);
#endif
}

// By the opposite angle: with the sines' signs the other way round.
SELFFORCING_INLINE Floats rotate_pairs_back(Floats x, Floats turns) {
  typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
  constexpr uint64_t kSignOfOdd = uint64_t{1} << 63;
  return rotate_pairs(x, reinterpret_cast<Floats>(reinterpret_cast<Pairs>(turns) ^ (Pairs{} + kSignOfOdd)));
}

// Makes the compiler keep a broadcast in a register: folded into each multiply-add it would be loaded once per use.
SELFFORCING_INLINE void keep_in_register(Floats& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#else
  (void)x;
#endif
}

// Minimax polynomials of 2^f on [-1/2, 1/2] (least squares, reweighted until the relative error was level).
// For bfloat16 2.8e-6: far below what a probability loses when it is rounded, and enough for the sum in lse. For
// float32 1.9e-9.
inline constexpr float kExp2BFloat16[] = {1.0f, 0.693124193f, 0.240240986f, 0.0559064278f, 0.00958285282f};
inline constexpr float kExp2Float32[] = {1.0f,           0.693147206f,   0.240226469f,   0.0555032878f,
                                         0.00961848896f, 0.00133999315f, 0.000153458111f};

// 2^x for x from -inf to 127; 0 below -126 or, with AVX-512, where the result underflows.
template <int kTerms>
SELFFORCING_INLINE Floats exp2(Floats x, const float (&polynomial)[kTerms]) {
#if defined(__AVX512F__)
  const Floats whole = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
  constexpr float kRound = 12582912.0f;
  const Floats clamped = maximum(broadcast(-127.0f), x);
  const Floats shifted = clamped + kRound, whole = shifted - kRound;
  x = clamped;
#endif
  const Floats fraction = x - whole;
  Floats power = broadcast(polynomial[kTerms - 1]);
#pragma GCC unroll 8
  for (int term = kTerms - 2; term >= 0; --term) power = multiply_add(power, fraction, broadcast(polynomial[term]));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, power, whole);
#else
  const Ints exponent = reinterpret_cast<Ints>(shifted) << 23;
  const Floats scaled = reinterpret_cast<Floats>(reinterpret_cast<Ints>(power) + exponent);
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(scaled) & ~(clamped < -126.0f));
#endif
}

// Natural logarithm of positive normal numbers, relative error about 1e-7. 0 gives -inf.
SELFFORCING_INLINE Floats log(Floats x) {
  // x = 2^exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2)); log(mantissa) = 2 atanh(t), t = (m - 1) / (m + 1).
  const Ints bits = reinterpret_cast<Ints>(x);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;
  const Floats mantissa = reinterpret_cast<Floats>(bits - (exponent << 23));
  const Floats t = (mantissa - 1.0f) / (mantissa + 1.0f), t2 = t * t;  // |t| < 0.172
  Floats series = broadcast(2.0f / 9);
  series = multiply_add(series, t2, broadcast(2.0f / 7));
  series = multiply_add(series, t2, broadcast(2.0f / 5));
  series = multiply_add(series, t2, broadcast(2.0f / 3));
  series = multiply_add(series * t2, t, t + t);
  const Floats result = multiply_add(__builtin_convertvector(exponent, Floats), broadcast(0.693147181f), series);
  return x == 0.0f ? broadcast(-__builtin_inff()) : result;
}

// rows[i][j] <-> rows[j][i]
SELFFORCING_INLINE void transpose(Floats (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_maskz_unpacklo_ps(0xffff, rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_maskz_unpackhi_ps(0xffff, rows[2 * i], rows[2 * i + 1]);
  }
  __m512 u[16];  // u[4 i + j]: columns j, j + 4, j + 8, j + 12 of rows 4 i to 4 i + 3
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(t[4 * i + half]), b = _mm512_castps_pd(t[4 * i + 2 + half]);
      u[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, a, b));
      u[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_maskz_shuffle_f32x4(0xffff, u[j], u[4 + j], 0x88);
    const __m512 high = _mm512_maskz_shuffle_f32x4(0xffff, u[j], u[4 + j], 0xdd);
    const __m512 low2 = _mm512_maskz_shuffle_f32x4(0xffff, u[8 + j], u[12 + j], 0x88);
    const __m512 high2 = _mm512_maskz_shuffle_f32x4(0xffff, u[8 + j], u[12 + j], 0xdd);
    rows[j] = _mm512_maskz_shuffle_f32x4(0xffff, low, low2, 0x88);
    rows[8 + j] = _mm512_maskz_shuffle_f32x4(0xffff, low, low2, 0xdd);
    rows[4 + j] = _mm512_maskz_shuffle_f32x4(0xffff, high, high2, 0x88);
    rows[12 + j] = _mm512_maskz_shuffle_f32x4(0xffff, high, high2, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 t[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  __m256 u[8];  // u[4 i + j]: columns j and j + 4 of rows 4 i to 4 i + 3
  for (int i = 0; i < 2; ++i) {
    for (int half = 0; half < 2; ++half) {
      u[4 * i + 2 * half] = _mm256_shuffle_ps(t[4 * i + half], t[4 * i + 2 + half], 0x44);
      u[4 * i + 2 * half + 1] = _mm256_shuffle_ps(t[4 * i + half], t[4 * i + 2 + half], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
#else
  const Floats a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Floats b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Floats c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Floats d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
#endif
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
