// Writing a block's keys and values into quantised pages on the CPU, compiled once per instruction set.
#include <float.h>

#include "../simd/elements.h"
#include "runs.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint16_t kNaNScale = 0x7fc0;

SELFFORCING_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// The lowest eight bits of every lane.
SELFFORCING_INLINE void narrow(uint8_t* to, Words words) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i low = reinterpret_cast<__m256i>(words & 0xffu);
  const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(low, low), low);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
#else
  const Bytes bytes = __builtin_convertvector(words, Bytes);
  memcpy(to, &bytes, sizeof(bytes));
#endif
}

SELFFORCING_INLINE void store(uint8_t* to, Words words, int count) {
  if (count == kLanes) return narrow(to, words);
  uint8_t padded[kLanes];
  narrow(padded, words);
  memcpy(to, padded, count);
}

template <typename Vector>
SELFFORCING_INLINE Vector maximum(Vector a, Vector b) {
  return a > b ? a : b;
}

// In halves, as sum_lanes (simd/elements.h).
SELFFORCING_INLINE uint32_t max_lanes(Ints x) {
#if defined(__AVX512F__)
  typedef int32_t Half __attribute__((vector_size(32)));
  const Half half = maximum<Half>(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                                  __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const Ints half = x;
#endif
  typedef int32_t Quarter __attribute__((vector_size(16)));
#if defined(__AVX2__)
  Quarter largest = maximum<Quarter>(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                                     __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  Quarter largest = half;
#endif
  largest = maximum<Quarter>(largest, __builtin_shufflevector(largest, largest, 2, 3, 0, 1));
  return static_cast<uint32_t>(largest[0] > largest[1] ? largest[0] : largest[1]);
}

// How each format rounds quotients, which are at most kLargest but for a rounding: the bits to keep are the lowest ones
// of a lane. Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
struct Int8 {
  static constexpr float kLargest = 127;
  static SELFFORCING_INLINE Words round(Floats x) { return reinterpret_cast<Words>(x + 12582912.0f); }
};

struct Int4 {
  static constexpr float kLargest = 7;
  static SELFFORCING_INLINE Words round(Floats x) { return (reinterpret_cast<Words>(x + 12582912.0f) + 8u) & 0xfu; }
};

struct Fp8 {
  static constexpr float kLargest = 448;
  static constexpr uint32_t kRebias = (127 - 7) << 3;         // what the exponents differ by, above three bits
  static constexpr uint32_t kLeastNormal = (127u - 6) << 23;  // 2^-6
  static SELFFORCING_INLINE Words round(Floats x) {
    const Words bits = reinterpret_cast<Words>(x), magnitude = bits & 0x7fffffffu;
    const Words normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - kRebias;
    // Below 2^-6 the last place is 2^-9, as it is of float32 numbers from 2^14 on.
    const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Floats>(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    return (magnitude < kLeastNormal ? subnormal : normal) | ((bits >> 24) & 0x80u);
  }
};

// The bfloat16 scale of elements whose largest magnitude has these bits, and as float32: 0 where all elements are 0.
struct Scale {
  uint16_t bits;
  float value;

  SELFFORCING_INLINE Scale(uint32_t amax_bits, float largest) : bits(kNaNScale), value(0) {
    if (amax_bits >= kInfinityBits) return;  // infinity or NaN
    const float exact = __builtin_bit_cast(float, amax_bits) / largest;
    bits = exact < FLT_MIN ? 0 : static_cast<uint16_t>((bits_of(exact) + 0xffffu) >> 16);
    value = __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
};

// Channels of one token and head that share a scale: x - offset.
template <typename Element>
struct Group {
  const typename Element::Storage* x;
  const float* offset;  // or nullptr

  SELFFORCING_INLINE Floats shifted(int64_t c, int count) const {
    const Floats value = load<Element>(x + c, count);
    return offset == nullptr ? value : value - load<Float32>(offset + c, count);
  }

  template <typename Format>
  SELFFORCING_INLINE Scale scale(int64_t channels) const {
    Ints amax{};
    for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
      // Compared as integers, a NaN is larger than all numbers.
      amax = maximum(amax, reinterpret_cast<Ints>(absolute(shifted(c, count))));
    });
    return Scale(max_lanes(amax), Format::kLargest);
  }
};

// A head of one token: [D] to as many bytes.
template <typename Element, typename Format>
SELFFORCING_INLINE void quantise_head(const Group<Element>& head, int64_t dim, uint8_t* to, uint16_t* scales) {
  const Scale scale = head.template scale<Format>(dim);
  scales[0] = scale.bits;
  if (scale.value == 0) {
    memset(to, 0, dim);
    return;
  }
  for_lanes(dim, [&](int64_t c, int count) __attribute__((always_inline)) {
    store(to + c, Format::round(head.shifted(c, count) / scale.value), count);
  });
}

// The same with a scale for every group and two channels in a byte.
template <typename Element>
SELFFORCING_INLINE void quantise_head_to_int4(const Group<Element>& head, int64_t dim, uint8_t* to, uint16_t* scales) {
  constexpr int kBytes = kInt4Group / 2;
  for (int64_t first = 0; first < dim; first += kInt4Group, to += kBytes, ++scales) {
    const Group<Element> group{head.x + first, head.offset == nullptr ? nullptr : head.offset + first};
    const Scale scale = group.template scale<Int4>(kInt4Group);
    *scales = scale.bits;
    if (scale.value == 0) {
      memset(to, 0x88, kBytes);
      continue;
    }
    for_lanes(kBytes, [&](int64_t c, int count) __attribute__((always_inline)) {
      const Words low = Int4::round(group.shifted(c, count) / scale.value);
      const Words high = Int4::round(group.shifted(c + kBytes, count) / scale.value);
      store(to + c, low | (high << 4), count);
    });
  }
}

// Calls visit(group, to, scales) for every token and head of a run.
template <typename Element, typename Visit>
SELFFORCING_INLINE void for_heads(const KVCacheWriteParams& p, const WriteSide& side, const WriteRun& run,
                                  const Visit& visit) {
  const int64_t groups = p.format == PageFormat::int4 ? p.head_dim / kInt4Group : 1;
  const auto* stream =
      static_cast<const typename Element::Storage*>(side.from.data) + run.stream * side.from.batch_stride;
  for (int64_t token = run.begin; token < run.end; ++token) {
    const int64_t offset = run.offset + token - run.begin;
    const auto* x = stream + token * side.from.token_stride;
    uint8_t* to = static_cast<uint8_t*>(side.pages) + run.page * side.page_stride + offset * side.token_stride;
    uint16_t* scales = side.scales + (run.page * p.page_size + offset) * p.num_kv_heads * groups;
    for (int64_t head = 0; head < p.num_kv_heads; ++head)
      visit(Group<Element>{x + head * side.from.head_stride,
                           side.offset == nullptr ? nullptr : side.offset + head * p.head_dim},
            to + head * side.head_stride, scales + head * groups);
  }
}

template <typename Element>
void quantise_run(const KVCacheWriteParams& p, const WriteSide& side, const WriteRun& run) {
  switch (p.format) {
    case PageFormat::int8:
      return for_heads<Element>(p, side, run, [&](const Group<Element>& head, uint8_t* to, uint16_t* scales) {
        quantise_head<Element, Int8>(head, p.head_dim, to, scales);
      });
    case PageFormat::fp8_e4m3:
      return for_heads<Element>(p, side, run, [&](const Group<Element>& head, uint8_t* to, uint16_t* scales) {
        quantise_head<Element, Fp8>(head, p.head_dim, to, scales);
      });
    case PageFormat::int4:
      return for_heads<Element>(p, side, run, [&](const Group<Element>& head, uint8_t* to, uint16_t* scales) {
        quantise_head_to_int4<Element>(head, p.head_dim, to, scales);
      });
    case PageFormat::elements: return;  // copied (cpu.cpp)
  }
}

}  // namespace

void kv_cache_quantise(const KVCacheWriteParams& params, const WriteSide& side, const WriteRun& run) {
  with_element(params.dtype, [&](auto element) { quantise_run<decltype(element)>(params, side, run); });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
