// Elements of quantised pages (geometry/pages.h) as vectors of float32, before they are scaled: an Element (elements.h)
// that is only read, and four bits at a time.
#pragma once
#include "elements.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace selfforcing {
namespace SELFFORCING_ISA {

typedef int8_t Bytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

// kLanes bytes with their signs. (GCC takes __builtin_convertvector from bytes to words apart.)
SELFFORCING_INLINE Ints widen_bytes(const void* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(static_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
#else
  Bytes bytes;
  memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, Ints);
#endif
}

struct Int8 {
  using Storage = int8_t;
  static constexpr float kUnit = 1;  // what a widened element must be multiplied by
  static SELFFORCING_INLINE Floats widen(const int8_t* from) {
    return __builtin_convertvector(widen_bytes(from), Floats);
  }
};

// Sign, four bits of exponent with bias 7, three of fraction; no infinities, and NaN where all bits but the sign are
// set (arXiv 2209.05433, section 3).
struct Float8E4M3 {
  using Storage = uint8_t;
  static constexpr float kUnit = 256;
  static SELFFORCING_INLINE Floats widen(const uint8_t* from) {
    // The same bits as a float16, whose bias is 15. Its subnormal numbers are exact whatever the machine makes of those
    // of float32.
    Shorts half = (shorts(from) << 7) & static_cast<int16_t>(0xbfff);
    half |= (half + 0x0080) & 0x4000;  // the last bit of the exponent, where a NaN's other bits carry into it
    uint16_t bits[kLanes];
    memcpy(bits, &half, sizeof(half));
    return Float16::widen(bits);
  }

 private:
  static SELFFORCING_INLINE Shorts shorts(const uint8_t* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return reinterpret_cast<Shorts>(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    Bytes bytes;
    memcpy(&bytes, from, sizeof(bytes));
    return __builtin_convertvector(bytes, Shorts);
#endif
  }
};

// Channels [d, d + kLanes) of a row: values from -8 to 7 (PageFormat::int4).
SELFFORCING_INLINE Floats widen_int4(const uint8_t* row, int64_t d) {
  constexpr int64_t kHalf = 16;  // channels of a group in the same four bits
  const Ints bytes = widen_bytes(row + d / (2 * kHalf) * kHalf + d % kHalf);
  // 2^23 + n has n in its last bits.
  const Ints bits = ((bytes >> (d % (2 * kHalf) < kHalf ? 0 : 4)) & 15) | 0x4b000000;
  return reinterpret_cast<Floats>(bits) - (0x1p23f + 8);
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
