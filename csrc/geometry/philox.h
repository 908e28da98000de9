// Random numbers that are a function of where they are wanted: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", SC'11), and standard normal numbers from it by the Box-Muller transform.
//
// The reference (python_ref/ops/philox.py), every instruction set of the CPU and the GPU give the same bits: integers
// are exact, and of float32 numbers only +, -, *, / and square roots are used, which IEEE 754 rounds in one way. No
// product may be fused with a sum: CMakeLists.txt tells the compilers so.
//
// Written for a Machine, which says what Word, Int and Float are (a number each, or a vector of each) and has what the
// operators of C++ lack; csrc/simd/philox.h has that of the CPU's vectors.
#pragma once
#include <math.h>
#include <string.h>

#include <cstdint>

#include "host_device.h"

namespace selfforcing {

// Element i of entry b of a batch is number i % 4 of the block of four that these make. The key is the seed, the
// counter is (i / 4, b, offset, offset / 2^32), with 0 for b where every entry has a seed of its own.
struct PhiloxNoise {
  const int64_t* seeds = nullptr;  // [1] or [B]; strides are 0 where the batch shares one
  const int64_t* offsets = nullptr;
  int64_t seed_stride = 0;
  int64_t offset_stride = 0;
  bool own_seeds = false;  // every entry has one
};

inline constexpr int kPhiloxNumbers = 4;

struct PhiloxStream {
  uint32_t key[2], entry, offset[2];

  SELFFORCING_HOST_DEVICE PhiloxStream(const PhiloxNoise& noise, int64_t batch) {
    const uint64_t seed = static_cast<uint64_t>(noise.seeds[batch * noise.seed_stride]);
    const uint64_t draw = static_cast<uint64_t>(noise.offsets[batch * noise.offset_stride]);
    key[0] = static_cast<uint32_t>(seed), key[1] = static_cast<uint32_t>(seed >> 32);
    offset[0] = static_cast<uint32_t>(draw), offset[1] = static_cast<uint32_t>(draw >> 32);
    entry = noise.own_seeds ? 0 : static_cast<uint32_t>(batch);
  }
};

// One number at a time.
struct ScalarMachine {
  using Word = uint32_t;
  using Int = int32_t;
  using Float = float;
  static SELFFORCING_HOST_DEVICE Word multiply_high(Word a, uint32_t b) {
    return static_cast<Word>(static_cast<uint64_t>(a) * b >> 32);
  }
  static SELFFORCING_HOST_DEVICE Float to_float(Int x) { return static_cast<float>(x); }
  static SELFFORCING_HOST_DEVICE Float square_root(Float x) { return sqrtf(x); }
};

template <typename To, typename From>
SELFFORCING_HOST_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Replaces a counter by four random words.
template <typename Machine>
SELFFORCING_HOST_DEVICE void philox4x32_10(typename Machine::Word (&counter)[4], uint32_t key0, uint32_t key1) {
  using Word = typename Machine::Word;
  constexpr int kRounds = 10;
  constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
  constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    const Word high0 = Machine::multiply_high(counter[0], kMultiplier0), low0 = counter[0] * kMultiplier0;
    const Word high1 = Machine::multiply_high(counter[2], kMultiplier1), low1 = counter[2] * kMultiplier1;
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
  }
}

// Two independent standard normal numbers from two random words: a radius sqrt(-2 ln u) and a turn (Box and Muller, "A
// note on the generation of random normal deviates", 1958). None is further from 0 than 6.7.
template <typename Machine>
SELFFORCING_HOST_DEVICE void box_muller(typename Machine::Word radius_word, typename Machine::Word turn_word,
                                        typename Machine::Float& first, typename Machine::Float& second) {
  using Word = typename Machine::Word;
  using Int = typename Machine::Int;
  using Float = typename Machine::Float;

  // u in (0, 1] as 2^exponent * m, m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(t), t = (m - 1) / (m + 1), |t| < 0.172.
  const Float u = (Machine::to_float(same_bits<Int>(radius_word >> 1)) + 0.5f) * 0x1p-31f;
  const Int bits = same_bits<Int>(u);
  const Int exponent = (bits - 0x3f3504f3) >> 23;
  const Float m = same_bits<Float>(bits - (exponent << 23));
  const Float t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  Float series = t2 * (2.0f / 9) + 2.0f / 7;
  series = series * t2 + 2.0f / 5;
  series = series * t2 + 2.0f / 3;
  series = series * t2 + 2.0f;
  const Float logarithm = Machine::to_float(exponent) * 0.693147181f + series * t;
  const Float radius = Machine::square_root(logarithm * -2.0f);

  // The nearest quarter turn, and the rest x in [-1/2, 1/2] of one; Taylor series in x of sin and cos (pi / 2 x).
  const Word quadrant = (turn_word + 0x20000000u) >> 30;
  const Float x = Machine::to_float(same_bits<Int>(turn_word - (quadrant << 30))) * 0x1p-30f, x2 = x * x;
  Float sine = x2 * 1.60441185e-4f - 4.68175414e-3f;
  sine = sine * x2 + 7.96926262e-2f;
  sine = sine * x2 - 6.45964098e-1f;
  sine = (sine * x2 + 1.57079633f) * x;
  Float cosine = x2 * -2.52020424e-5f + 9.19260274e-4f;
  cosine = cosine * x2 - 2.08634807e-2f;
  cosine = cosine * x2 + 2.53669508e-1f;
  cosine = cosine * x2 - 1.23370055f;
  cosine = cosine * x2 + 1.0f;

  // Odd quarter turns swap the two; signs are those of the quadrant.
  const Word swap = 0u - (quadrant & 1u);
  const Word sine_bits = same_bits<Word>(sine), cosine_bits = same_bits<Word>(cosine);
  const Word along = (cosine_bits & ~swap) | (sine_bits & swap), across = (sine_bits & ~swap) | (cosine_bits & swap);
  first = radius * same_bits<Float>(along ^ (((quadrant + 1u) & 2u) << 30));
  second = radius * same_bits<Float>(across ^ ((quadrant & 2u) << 30));
}

// Numbers 4 block to 4 block + 3 of a stream.
template <typename Machine>
SELFFORCING_HOST_DEVICE void philox_normals(const PhiloxStream& stream, typename Machine::Word block,
                                            typename Machine::Float (&numbers)[kPhiloxNumbers]) {
  using Word = typename Machine::Word;
  Word words[4] = {block, Word{} + stream.entry, Word{} + stream.offset[0], Word{} + stream.offset[1]};
  philox4x32_10<Machine>(words, stream.key[0], stream.key[1]);
  box_muller<Machine>(words[0], words[1], numbers[0], numbers[1]);
  box_muller<Machine>(words[2], words[3], numbers[2], numbers[3]);
}

}  // namespace selfforcing
