// Rows of elements, several at a time, and stores for results that no cache would hold.
#pragma once
#include "elements.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace selfforcing {
namespace SELFFORCING_ISA {

// Sums over the channels of a row would wait for each other: an addition takes several cycles, and two can start in
// one. So short rows are taken kSums at a time; longer ones one by one with kSums partial sums, for memory is read
// fastest in one stream. Which of the two depends on the row's size alone, and with it the order of additions.
inline constexpr int kSums = 4;
inline constexpr int64_t kShortRowBytes = 4096;

// Rows that are taken at a time, and partial sums of each.
template <int kCount, int kParts>
struct Rows {
  static constexpr int count = kCount;
  static constexpr int parts = kParts;
};

// Calls visit(Rows, first row) for [begin, end).
template <typename Visit>
SELFFORCING_INLINE void for_rows(int64_t begin, int64_t end, int64_t row_bytes, const Visit& visit) {
  int64_t row = begin;
  if (row_bytes >= kShortRowBytes) {
    for (; row < end; ++row) visit(Rows<1, kSums>{}, row);
  } else {
    for (; row + kSums <= end; row += kSums) visit(Rows<kSums, 1>{}, row);
    for (; row < end; ++row) visit(Rows<1, 1>{}, row);
  }
}

// As for_lanes; the third argument of body(i, count, part) is the partial sum that takes these elements.
template <typename Rows, typename Body>
SELFFORCING_INLINE void for_lanes_in_parts(int64_t n, const Body& body) {
  int64_t i = 0;
  if constexpr (Rows::parts == kSums) {
    static_assert(kSums == 4);
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      body(i, kLanes, 0);
      body(i + kLanes, kLanes, 1);
      body(i + 2 * kLanes, kLanes, 2);
      body(i + 3 * kLanes, kLanes, 3);
    }
  }
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes, 0);
  if (i < n) body(i, static_cast<int>(n - i), 0);
}

// A sum of every row.
template <typename Rows>
class RowSums {
 public:
  SELFFORCING_INLINE Floats& part(int row, int part) { return sums_[row * Rows::parts + part]; }
  SELFFORCING_INLINE float total(int row) const {
    if constexpr (Rows::parts == kSums)
      return sum_lanes((sums_[0] + sums_[1]) + (sums_[2] + sums_[3]));
    else
      return sum_lanes(sums_[row]);
  }

 private:
  Floats sums_[Rows::count * Rows::parts] = {};
};

// Asks for what will be read next, while the present is computed. Any address will do. Where there is enough to
// compute, one asks a page further: the processor's own prefetching ends with the page.
inline constexpr int64_t kPageBytes = 4096;
SELFFORCING_INLINE void prefetch(const void* at, int64_t bytes_ahead = 0) {
  __builtin_prefetch(static_cast<const char*>(at) + bytes_ahead);
}

// An Element whose stores go past the caches, to multiples of a vector's size. An ordinary store first loads the line
// that it writes to, which is a third of the traffic of a copy.
template <typename Element>
struct Streamed : Element {
#if defined(__AVX2__)
  static SELFFORCING_INLINE void narrow(typename Element::Storage* to, Floats x) {
    alignas(64) typename Element::Storage packed[kLanes];
    Element::narrow(packed, x);
#if defined(__AVX512F__)
    if constexpr (sizeof(packed) == 64)
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(packed));
#endif
    if constexpr (sizeof(packed) == 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_load_si256(reinterpret_cast<const __m256i*>(packed)));
    if constexpr (sizeof(packed) == 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(packed)));
  }
#endif
};

// Results of this size leave the caches before anyone reads them.
inline constexpr int64_t kStreamedBytes = int64_t{8} << 20;

// Makes streamed stores of this thread visible to others.
SELFFORCING_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Calls call(element, output) with the Element types to load and to store with, for a contiguous result of `elements`
// elements that is written in pieces of `piece` consecutive ones.
template <typename Call>
SELFFORCING_INLINE void with_output(DType dtype, const void* result, int64_t elements, int64_t piece,
                                    const Call& call) {
  with_element(dtype, [&](auto element) {
    using Storage = typename decltype(element)::Storage;
    const bool aligned = piece % kLanes == 0 && reinterpret_cast<uintptr_t>(result) % (kLanes * sizeof(Storage)) == 0;
    if (aligned && elements * static_cast<int64_t>(sizeof(Storage)) >= kStreamedBytes)
      call(element, Streamed<decltype(element)>{});
    else
      call(element, element);
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
