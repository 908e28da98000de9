// Elements of any dtype as vectors of float32, for elementwise kernels. Included by files that are compiled once per
// instruction set (isa.h); everything here lives in that set's namespace, so no code of one set reaches another.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../geometry/parallel.h"
#include "../geometry/tensor.h"
#include "isa.h"

#define SELFFORCING_INLINE inline __attribute__((always_inline))

namespace selfforcing {
namespace SELFFORCING_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Minus, because 0 + x is a real addition (0 + -0 is 0), but x - 0 is x.
SELFFORCING_INLINE Floats broadcast(float x) { return x - Floats{}; }

// In halves, so that rounding grows with the logarithm of the number of lanes. (Written as a loop over lanes, GCC goes
// through memory.)
SELFFORCING_INLINE float sum_lanes(Floats x) {
#if defined(__AVX512F__)
  typedef float Half __attribute__((vector_size(32)));
  const Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const Floats half = x;
#endif
  typedef float Quarter __attribute__((vector_size(16)));
#if defined(__AVX2__)
  Quarter sum = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  Quarter sum = half;
#endif
  sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1);
  return sum[0] + sum[1];
}

SELFFORCING_INLINE Floats absolute(Floats x) {
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(x) & (Words{} + 0x7fffffffu));
}

// (x1, x0, x3, x2, ...): the partner of every element of an interleaved pair.
SELFFORCING_INLINE Floats swap_pairs(Floats x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shufflevector(x, x, 1, 0, 3, 2);
#endif
}

// Intrinsics of AVX-512 below are the zero-masked forms: GCC warns of the undefined source inside the plain ones.

struct Float32 {
  using Storage = float;
  static SELFFORCING_INLINE Floats widen(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof(x));
    return x;
  }
  static SELFFORCING_INLINE void narrow(float* to, Floats x) { memcpy(to, &x, sizeof(x)); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static SELFFORCING_INLINE Floats widen(const uint16_t* from) {
#if defined(__AVX512F__)
    const __m512i words =
        _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(words) << 16);
#elif defined(__AVX2__)
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(words) << 16);
#else
    Halves bits;
    memcpy(&bits, from, sizeof(bits));
    return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
#endif
  }
  // Rounds to nearest even; a NaN stays one. (The instruction takes subnormals for 0.)
  static SELFFORCING_INLINE void narrow(uint16_t* to, Floats x) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    memcpy(to, &half, sizeof(half));
#else
    const Words bits = reinterpret_cast<Words>(x);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = (bits >> 16) | 0x40u;  // the payload must not round up to infinity
    const Words words = x == x ? rounded : nan;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(words), reinterpret_cast<__m256i>(words));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    const Halves half = __builtin_convertvector(words, Halves);
    memcpy(to, &half, sizeof(half));
#endif
#endif
  }
};

struct Float16 {
  using Storage = uint16_t;
#if !defined(__F16C__)  // in integers: not every compiler has _Float16 for every machine
  static constexpr uint32_t kRebias = (127 - 15) << 23;     // what the exponents differ by
  static constexpr uint32_t kOverflow = (127u + 16) << 23;  // 2^16, which rounds to infinity
#endif
  static SELFFORCING_INLINE Floats widen(const uint16_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Halves half;
    memcpy(&half, from, sizeof(half));
    const Words bits = __builtin_convertvector(half, Words), magnitude = bits & 0x7fffu;
    const Floats subnormal = __builtin_convertvector(reinterpret_cast<Ints>(magnitude), Floats) * 0x1p-24f;
    const Words normal = (magnitude << 13) + (magnitude < 0x7c00u ? Words{} + kRebias : Words{} + 2 * kRebias);
    const Words words = magnitude < 0x400u ? reinterpret_cast<Words>(subnormal) : normal;
    return reinterpret_cast<Floats>(words | (bits & 0x8000u) << 16);
#endif
  }
  static SELFFORCING_INLINE void narrow(uint16_t* to, Floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffffu;
    const Words bounded = magnitude < kOverflow ? magnitude : Words{} + kOverflow;
    const Words normal = (bounded + 0xfffu + ((bounded >> 13) & 1u) - kRebias) >> 13;
    // Below 2^-14 the last place is 2^-24, as it is of numbers around 1/2.
    const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(bounded) + 0.5f) - 0x3f000000u;
    const Words number = bounded < 0x38800000u ? subnormal : normal;
    const Words nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    const Words words = (x == x ? number : nan) | ((bits >> 16) & 0x8000u);
    const Halves half = __builtin_convertvector(words, Halves);
    memcpy(to, &half, sizeof(half));
#endif
  }
};

// Loads `count` elements, at most kLanes; the other lanes are 0.
template <typename Element>
SELFFORCING_INLINE Floats load(const typename Element::Storage* from, int count) {
  if (count == kLanes) return Element::widen(from);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(*from) == 4) return _mm512_maskz_loadu_ps(mask, from);
  alignas(32) typename Element::Storage padded[kLanes];
  if constexpr (sizeof(*from) == 2)
    _mm256_store_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(*from) == 1)
    _mm_store_si128(reinterpret_cast<__m128i*>(padded), _mm_maskz_loadu_epi8(mask, from));
#else
  typename Element::Storage padded[kLanes] = {};
  memcpy(padded, from, count * sizeof(*from));
#endif
  return Element::widen(padded);
}

template <typename Element>
SELFFORCING_INLINE void store(typename Element::Storage* to, Floats x, int count) {
  if (count == kLanes) return Element::narrow(to, x);
  typename Element::Storage padded[kLanes];
  Element::narrow(padded, x);
  memcpy(to, padded, count * sizeof(*to));
}

// x with the lanes from `count` on set to 0.
SELFFORCING_INLINE Floats keep_lanes(Floats x, int count) {
  if (count == kLanes) return x;
  for (int lane = count; lane < kLanes; ++lane) x[lane] = 0;
  return x;
}

// Calls body(i, count) for consecutive runs of `count` elements of [0, n): kLanes each (a constant once inlined; mark
// the body always_inline), then the rest.
template <typename Body>
SELFFORCING_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Calls call(element) with the Element type of dtype.
template <typename Call>
SELFFORCING_INLINE void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float32: return call(Float32{});
    case DType::bfloat16: return call(BFloat16{});
    case DType::float16: return call(Float16{});
  }
}

// Waking the other threads costs some microseconds: below kSerialElements one thread is done sooner.
inline constexpr int64_t kSerialElements = 32768;
inline constexpr int64_t kGrainElements = 16384;

// Calls body(begin, end) over ranges that cover [0, num_rows), concurrently if there is enough to do. The ranges do not
// depend on the number of threads; row_elements is the work of a row.
template <typename Body>
void for_ranges(const Parallel& parallel, int64_t num_rows, int64_t row_elements, const Body& body) {
  if (num_rows * row_elements <= kSerialElements || parallel.num_threads <= 1) {
    if (num_rows > 0) body(int64_t{0}, num_rows);
    return;
  }
  const int64_t grain = row_elements < kGrainElements ? kGrainElements / row_elements : 1;
  parallel.for_each((num_rows + grain - 1) / grain, [&](int64_t range, int32_t) {
    const int64_t begin = range * grain;
    body(begin, begin + grain < num_rows ? begin + grain : num_rows);
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
