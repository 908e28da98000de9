// csrc/geometry/philox.h on vectors: a lane has a block of four numbers.
#pragma once
#include "../geometry/philox.h"
#include "elements.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

struct VectorMachine {
  using Word = Words;
  using Int = Ints;
  using Float = Floats;

  // Even and odd lanes by themselves, as the instructions that widen take them.
  static SELFFORCING_INLINE Words multiply_high(Words a, uint32_t b) {
#if defined(__AVX512F__)
    const __m512i words = reinterpret_cast<__m512i>(a), factor = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_maskz_mul_epu32(0xff, words, factor);
    const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, words, 32), factor);
    return reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd));
#elif defined(__AVX2__)
    const __m256i words = reinterpret_cast<__m256i>(a), factor = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32(words, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factor);
    return reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
    typedef uint64_t Wide __attribute__((vector_size(8 * kLanes)));
    return __builtin_convertvector(__builtin_convertvector(a, Wide) * uint64_t{b} >> 32, Words);
#endif
  }
  static SELFFORCING_INLINE Floats to_float(Ints x) { return __builtin_convertvector(x, Floats); }
  static SELFFORCING_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
  }
};

// Memory for a few numbers of a stream at a time.
class DrawnNormals {
 public:
  static constexpr int64_t kMost = 256;

  // Where number `first` is and, behind it, the others up to first + count; count is at most kMost.
  const float* draw(const PhiloxStream& stream, int64_t first, int64_t count) {
    const int64_t begin = first / kPhiloxNumbers, end = (first + count + kPhiloxNumbers - 1) / kPhiloxNumbers;
    Words lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
    for (int64_t block = begin; block < end; block += kLanes) {
      Floats numbers[kPhiloxNumbers];
      philox_normals<VectorMachine>(stream, lanes + static_cast<uint32_t>(block), numbers);
      float* to = numbers_ + (block - begin) * kPhiloxNumbers;
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < kPhiloxNumbers; ++i) to[lane * kPhiloxNumbers + i] = numbers[i][lane];
    }
    return numbers_ + (first - begin * kPhiloxNumbers);
  }

 private:
  // One block more than they fill, if the first is not the first of its block; and the rest of the last vector.
  alignas(64) float numbers_[kMost + kPhiloxNumbers * (kLanes + 1)];
};

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
