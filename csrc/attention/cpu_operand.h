// How elements become operands of a matrix product: 4-byte words that hold one float32 or, where the machine
// multiplies pairs of bfloat16 (AVX512-BF16), two neighbours of the summed dimension. Everything packed is an array of
// words, written float*; products run over words.
#pragma once
#include "../simd/vector.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// One float32 a word; other dtypes are widened on their way in.
template <typename E>
struct Operand {
  using Element = E;
  using Storage = typename Element::Storage;
  static constexpr int kPack = 1;  // elements in a word
  // Steps that are summed in one go: fewer where every product is rounded before it is added.
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  static constexpr int kRun = 64;
#else
  static constexpr int kRun = 16;
#endif
  static constexpr const auto& kExp2 = kExp2Float32;

  static SELFFORCING_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return SELFFORCING_ISA::multiply_add(a, b, c);
  }
  // `count` words, at most kLanes, from a row of elements; the other lanes are 0.
  static SELFFORCING_INLINE Floats load_words(const Storage* row, int count) { return load<Element>(row, count); }
  // Words of one summed index from vectors over the other dimension.
  static SELFFORCING_INLINE Floats join(const Floats (&rows)[kPack]) { return rows[0]; }
  // The same words from one row at a time: the first sets them, the others complete them.
  static SELFFORCING_INLINE void store_part(float* words, Floats x, int) { store(words, x); }
  // What an operand keeps of x.
  static SELFFORCING_INLINE Floats rounded(Floats x) {
    Storage elements[kLanes];
    Element::narrow(elements, x);
    return Element::widen(elements);
  }
  // kLanes neighbours of the summed dimension, as kLanes / kPack words.
  static SELFFORCING_INLINE void store_summed(float* words, Floats x) { store(words, x); }
  // Joins kPack rows of `count` elements (0 beyond) and calls put(d, words) for every kLanes elements from d on.
  template <typename Put>
  static SELFFORCING_INLINE void join_rows(const Storage* const (&rows)[kPack], int count, const Put& put) {
    for (int d = 0; d < count; d += kLanes) put(d, load<Element>(rows[0] + d, count - d < kLanes ? count - d : kLanes));
  }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<BFloat16> {
  using Element = BFloat16;
  using Storage = uint16_t;
  static constexpr int kPack = 2;
  static constexpr int kRun = 1 << 30;  // sums lose nothing beside operands of 8 bits
  static constexpr const auto& kExp2 = kExp2BFloat16;

  static SELFFORCING_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static SELFFORCING_INLINE Floats load_words(const uint16_t* row, int count) {
    return (Floats)_mm512_maskz_loadu_epi32((1u << count) - 1, row);
  }
  static SELFFORCING_INLINE Floats join(const Floats (&rows)[kPack]) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
    return (Floats)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  }
  static SELFFORCING_INLINE Floats rounded(Floats x) { return x; }  // done where words are made
  static SELFFORCING_INLINE void store_part(float* words, Floats x, int row) {
    const Words bits = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh(x));
    store(words, (Floats)(row == 0 ? bits : (Words)load(words) | bits << 16));
  }
  static SELFFORCING_INLINE void store_summed(float* words, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), (__m256i)_mm512_cvtneps_pbh(x));
  }
  template <typename Put>
  static SELFFORCING_INLINE void join_rows(const uint16_t* const (&rows)[kPack], int count, const Put& put) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int d = 0; d < count; d += 2 * kLanes) {
      const int words = (count - d) / 2 < kLanes ? (count - d) / 2 : kLanes;
      const __m512i a = (__m512i)load_words(rows[0] + d, words), b = (__m512i)load_words(rows[1] + d, words);
      put(d, (Floats)_mm512_permutex2var_epi16(a, low, b));
      if (2 * words > kLanes) put(d + kLanes, (Floats)_mm512_permutex2var_epi16(a, high, b));
    }
  }
};
#endif

// sums[i][j] += sum over steps s of a[i * a_row + s * a_step] * b[s * b_step + j * kLanes ...]
template <typename Op, int kRows, int kVectors>
SELFFORCING_INLINE void multiply_run(Floats (&sums)[kRows][kVectors], const float* a, int64_t a_row, int64_t a_step,
                                     const float* b, int64_t b_step, int steps) {
#pragma GCC unroll 2
  for (int step = 0; step < steps; ++step) {
    Floats column[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) column[j] = load(b + step * b_step + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      Floats factor = broadcast(a[i * a_row + step * a_step]);
      keep_in_register(factor);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Op::multiply_add(factor, column[j], sums[i][j]);
    }
  }
}

// The same in runs of Op::kRun steps, each summed from zero: the rounding of one long running sum would grow with the
// square root of its length.
template <typename Op, int kRows, int kVectors>
SELFFORCING_INLINE void multiply(Floats (&sums)[kRows][kVectors], const float* a, int64_t a_row, int64_t a_step,
                                 const float* b, int64_t b_step, int steps) {
  multiply_run<Op>(sums, a, a_row, a_step, b, b_step, steps < Op::kRun ? steps : Op::kRun);
  for (int start = Op::kRun; start < steps; start += Op::kRun) {
    Floats run[kRows][kVectors] = {};
    multiply_run<Op>(run, a + start * a_step, a_row, a_step, b + start * b_step, b_step,
                     steps - start < Op::kRun ? steps - start : Op::kRun);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += run[i][j];
  }
}

// Rows of elements, `count` of them, to words [word][lane]: row i is lane i of kVectors vectors; missing rows are 0.
// Every word is exclusive-ored with `flip`.
template <typename Op>
void pack_lanes(float* to, int vectors, const typename Op::Storage* rows, int64_t stride, int count, int dim,
                uint32_t flip) {
  const int words = dim / Op::kPack;
  for (int j = 0; j < vectors; ++j) {
    for (int word = 0; word < words; word += kLanes) {
      const int width = words - word < kLanes ? words - word : kLanes;
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int row = j * kLanes + i;
        block[i] = row < count ? Op::load_words(rows + row * stride + word * Op::kPack, width) : Floats{};
        block[i] = reinterpret_cast<Floats>(reinterpret_cast<Words>(block[i]) ^ (Words{} + flip));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < width) store(to + ((word + i) * vectors + j) * kLanes, block[i]);
    }
  }
}

// Rows lie a token apart, farther than the hardware looks ahead: asks for a row some rows before it is needed.
inline constexpr int kPrefetchRows = 8;

SELFFORCING_INLINE void prefetch_row(const void* row, int64_t bytes) {
  constexpr int kCacheLine = 64;
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(row) + at);
}

// A row of elements as words.
template <typename Op>
SELFFORCING_INLINE void pack_row(float* to, const typename Op::Storage* row, int dim) {
  const int words = dim / Op::kPack;
  int word = 0;
  for (; word + kLanes <= words; word += kLanes) store(to + word, Op::load_words(row + word * Op::kPack, kLanes));
  if (word < words) store<Float32>(to + word, Op::load_words(row + word * Op::kPack, words - word), words - word);
}

// Splits rows [first, first + count) of a tile by the words that they are joined to: calls whole(i) for every kPack
// rows that have theirs alone, from row first + i on, and part(i) for a row that shares its with one before or after.
template <typename Op, typename Whole, typename Part>
SELFFORCING_INLINE void for_words(int first, int count, const Whole& whole, const Part& part) {
  int i = 0;
  for (; i < count && (first + i) % Op::kPack != 0; ++i) part(i);
  for (; i + Op::kPack <= count; i += Op::kPack) whole(i);
  for (; i < count; ++i) part(i);
}

// A tile of keys or values as operands, in one form or both. Rows are written in order: what is written too much of one
// is overwritten by the next, and the memory is kLanes words longer than the last.
template <typename Op>
struct PackedRows {
  int dim;
  float* rows;             // words [row][word]: the channels will be summed. Or nullptr
  float* joined;           // words of kPack rows each, vectors over channels: the rows will be summed. Or nullptr
  int64_t joined_row;      // words from kPack rows to the next
  int64_t joined_channel;  // channel d, a multiple of kLanes, is d times this many words further

  SELFFORCING_INLINE float* joined_at(int row) const {
    return joined + static_cast<uint32_t>(row) / Op::kPack * joined_row;
  }

  // Where one row goes.
  struct Place {
    float *words, *joined;
    int64_t joined_channel;
    int part;  // of the joined words

    // Channels [d, d + kLanes).
    SELFFORCING_INLINE void put(int64_t d, Floats x) const {
      x = Op::rounded(x);
      if (words != nullptr) Op::store_summed(words + static_cast<uint64_t>(d) / Op::kPack, x);
      if (joined != nullptr) Op::store_part(joined + d * joined_channel, x, part);
    }
  };
  SELFFORCING_INLINE Place place(int row) const {
    return {rows == nullptr ? nullptr : rows + int64_t{row} * (dim / Op::kPack),
            joined == nullptr ? nullptr : joined_at(row), joined_channel,
            static_cast<int>(static_cast<uint32_t>(row) % Op::kPack)};
  }

  // Rows [first, end) as zeros.
  void clear(int first, int end) const {
    const int words = dim / Op::kPack;
    if (rows != nullptr) memset(rows + int64_t{first} * words, 0, int64_t{end - first} * words * sizeof(float));
    if (joined == nullptr) return;
    for (int row = round_up(first, Op::kPack); row < end; row += Op::kPack)
      for (int d = 0; d < dim; d += kLanes) store(joined_at(row) + d * joined_channel, Floats{});
  }
};

// Packs `count` rows that lie in memory as rows from `first` on. (By value, here and below: what lies behind a
// reference would be read again after every store.)
template <typename Op>
void pack_rows(const typename Op::Storage* from, int64_t stride, int count, int first, PackedRows<Op> to) {
  const auto row_at = [&](int i) __attribute__((always_inline)) {
    prefetch_row(from + (i + kPrefetchRows) * stride, to.dim * sizeof(*from));
    return from + i * stride;
  };
  if (to.rows != nullptr)
    for (int i = 0; i < count; ++i)
      pack_row<Op>(to.rows + int64_t{first + i} * (to.dim / Op::kPack), row_at(i), to.dim);
  if (to.joined == nullptr) return;
  for_words<Op>(
      first, count,
      [&](int i) __attribute__((always_inline)) {
        const typename Op::Storage* rows[Op::kPack];
#pragma GCC unroll 2
        for (int j = 0; j < Op::kPack; ++j) rows[j] = row_at(i + j);
        float* joined = to.joined_at(first + i);
        Op::join_rows(rows, to.dim, [&](int d, Floats words) { store(joined + d * to.joined_channel, words); });
      },
      [&](int i) __attribute__((always_inline)) {
        const typename Op::Storage* row = row_at(i);
        float* joined = to.joined_at(first + i);
        for_lanes(to.dim, [&](int64_t d, int lanes) __attribute__((always_inline)) {
          Op::store_part(joined + d * to.joined_channel, load<typename Op::Element>(row + d, lanes),
                         (first + i) % Op::kPack);
        });
      });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
