// Cosines and sines of tokens' positions on the GPU, computed where they are needed: no table that a kernel of its own
// would have to fill first, and no arithmetic in double, of which many GPUs have little.
#pragma once
#include "../ptx/elements.cuh"
#include "params.h"

namespace selfforcing {

// ---- Frequencies: how far each pair of an axis turns per step, in units of 2^-64 turns. Times a position, modulo
// 2^64, this is the position's angle, for whole turns do not count.

constexpr int kMaxAxisPairs = 44;  // of a head of 256 channels
constexpr int kMaxHeadPairs = 128;

// Where the frequencies of an axis of that many pairs begin.
SELFFORCING_HOST_DEVICE constexpr int32_t first_frequency(int32_t pairs) { return pairs * (pairs - 1) / 2; }

struct RopeFrequencies {
  uint64_t of[first_frequency(kMaxAxisPairs + 1)];
};

// As RopeAxes::frequency, but for the last digits of a double, by the compiler.
constexpr RopeFrequencies rope_frequencies() {
  constexpr double kLogBase = 9.210340371976182736, kPi = 3.141592653589793238;  // e^kLogBase is kRopeBase
  constexpr int kTerms = 80;                                                     // of the series of e^x
  RopeFrequencies frequencies{};
  for (int pairs = 1; pairs <= kMaxAxisPairs; ++pairs)
    for (int j = 0; j < pairs; ++j) {
      const double x = kLogBase * j / pairs;
      double power = 1, term = 1;
      for (int i = 1; i < kTerms; ++i) power += term *= x / i;
      frequencies.of[first_frequency(pairs) + j] = static_cast<uint64_t>(0x1p63 / (kPi * power));
    }
  return frequencies;
}

__device__ constexpr RopeFrequencies kRopeFrequencies = rope_frequencies();

// ---- Cosine (x) and sine (y) of an angle in units of 2^-64 turns, both off by less than a unit in the last place.
__device__ __forceinline__ float2 turn_of(uint64_t angle) {
  // The nearest quarter of a turn, and what is left: an eighth at most, to either side.
  const uint64_t quarter = (angle + (uint64_t{1} << 61)) >> 62;
  const int64_t rest = static_cast<int64_t>(angle - (quarter << 62));
  // In radians: x, and what it is off by.
  constexpr float kRadians = 0x1.921fb6p-62f, kRadiansRest = -0x1.777a5cp-87f;  // 2 pi / 2^64, in two parts
  const float high = static_cast<float>(rest), low = static_cast<float>(rest - static_cast<int64_t>(high));
  const float product = high * kRadians;
  const float missing = fmaf(low, kRadians, fmaf(high, kRadiansRest, fmaf(high, kRadians, -product)));
  const float x = product + missing, off = missing - (x - product);
  // Taylor's series, until a term is below a hundredth of the last place.
  const float square = x * x;
  float cosine = -1.0f / 3628800;
  cosine = fmaf(cosine, square, 1.0f / 40320);
  cosine = fmaf(cosine, square, -1.0f / 720);
  cosine = fmaf(cosine, square, 1.0f / 24);
  cosine = fmaf(cosine, square, -0.5f);
  cosine = 1.0f + fmaf(cosine, square, -off * x);
  float sine = 1.0f / 362880;
  sine = fmaf(sine, square, -1.0f / 5040);
  sine = fmaf(sine, square, 1.0f / 120);
  sine = fmaf(sine, square, -1.0f / 6);
  sine = x + fmaf(sine, square * x, off * cosine);

  const bool odd = quarter % 2 == 1;
  const float along = odd ? sine : cosine, across = odd ? cosine : sine;
  return {quarter % 4 == 1 || quarter % 4 == 2 ? -along : along, quarter % 4 >= 2 ? -across : across};
}

// ---- Of kWidth channels of a head.
template <int kWidth>
struct Turns {
  static_assert(kWidth % 2 == 0);
  float cosines[kWidth / 2], sines[kWidth / 2];

  __device__ __forceinline__ void rotate(float (&values)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const float real = values[2 * i], imaginary = values[2 * i + 1];
      values[2 * i] = real * cosines[i] - imaginary * sines[i];
      values[2 * i + 1] = real * sines[i] + imaginary * cosines[i];
    }
  }
};

// ---- Of a token: where it is on each axis.
class TokenPosition {
 public:
  __device__ __forceinline__ TokenPosition(const RopeParams& params, int64_t stream, int64_t token)
      : inverse_(params.inverse),
        frame_pairs_(params.axes.pairs[0]),
        row_pairs_(params.axes.pairs[1]),
        start_(params.start_frame[params.start_of(stream)]) {
    const uint32_t rows = static_cast<uint32_t>(params.axes.size[1]),
                   columns = static_cast<uint32_t>(params.axes.size[2]);
    const uint32_t line = static_cast<uint32_t>(token) / columns;
    column_ = static_cast<uint32_t>(token) - line * columns;
    frame_ = line / rows;
    row_ = line - frame_ * rows;
  }

  // Of a pair of a head; of the opposite angle when inverse.
  __device__ __forceinline__ float2 turn(int32_t pair) const {
    const bool of_frame = pair < frame_pairs_, of_row = pair < frame_pairs_ + row_pairs_;
    const int32_t pairs = of_frame ? frame_pairs_ : row_pairs_;  // a row has as many as a column
    const int32_t within = pair - (of_frame ? 0 : of_row ? frame_pairs_ : frame_pairs_ + row_pairs_);
    const int64_t position = of_frame ? int64_t{start_} + frame_ : of_row ? row_ : column_;
    const uint64_t angle = kRopeFrequencies.of[first_frequency(pairs) + within] * static_cast<uint64_t>(position);
    return turn_of(inverse_ ? 0 - angle : angle);
  }

  // Of channels [d, d + kWidth) of a head; d is even.
  template <int kWidth>
  __device__ __forceinline__ Turns<kWidth> turns(int32_t d) const {
    Turns<kWidth> turns;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const float2 of_pair = turn(d / 2 + i);
      turns.cosines[i] = of_pair.x, turns.sines[i] = of_pair.y;
    }
    return turns;
  }

 private:
  bool inverse_;
  int32_t frame_pairs_, row_pairs_, start_;
  uint32_t frame_, row_, column_;
};

// ---- Of all pairs of a token, in shared memory: what the lanes of a warp compute for each other.
class alignas(16) WarpTurns {
 public:
  // All lanes of the warp come along.
  __device__ __forceinline__ void fill(const RopeParams& params, int64_t stream, int64_t token) {
    const TokenPosition position(params, stream, token);
    for (int32_t pair = static_cast<int32_t>(threadIdx.x % ptx::kWarpSize); pair < params.head_dim / 2;
         pair += ptx::kWarpSize) {
      const float2 turn = position.turn(pair);
      cosines_[pair] = turn.x, sines_[pair] = turn.y;
    }
    __syncwarp();
  }

  // Of channels [d, d + kWidth) of a head; d is a multiple of kWidth.
  template <int kWidth>
  __device__ __forceinline__ Turns<kWidth> turns(int32_t d) const {
    Turns<kWidth> turns;
    ptx::load_elements<float>(cosines_ + d / 2, turns.cosines);
    ptx::load_elements<float>(sines_ + d / 2, turns.sines);
    return turns;
  }

 private:
  float cosines_[kMaxHeadPairs], sines_[kMaxHeadPairs];
};

}  // namespace selfforcing
