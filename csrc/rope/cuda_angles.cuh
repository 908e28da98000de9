// Rotation of a token's channels by a table of cosines and sines on the GPU, as attention does it that reads keys many
// times. Kernels that rotate once compute what they need (cuda_turns.cuh).
#pragma once
#include "../geometry/rope_axes.h"
#include "../ptx/device.cuh"

namespace selfforcing {

// The rows of a table (RopeAxes::table_offset) that turn one token: where they begin, each moved so that it is indexed
// by the pair's number in the head. Numbers of entries rather than pointers, since every pair chooses one of three.
class TokenAngles {
 public:
  TokenAngles() = default;

  // The table has rows for `table_frames` frames.
  __device__ __forceinline__ TokenAngles(const RopeAxes& axes, const float* table, int32_t token, int32_t table_frames)
      : table_(reinterpret_cast<const float2*>(table)),
        frame_pairs_(static_cast<uint32_t>(axes.pairs[0])),
        row_pairs_end_(static_cast<uint32_t>(axes.pairs[0] + axes.pairs[1])) {
    const uint32_t rows = static_cast<uint32_t>(axes.size[1]), columns = static_cast<uint32_t>(axes.size[2]);
    const uint32_t row_pairs = row_pairs_end_ - frame_pairs_, column_pairs = static_cast<uint32_t>(axes.pairs[2]);
    const uint32_t line = static_cast<uint32_t>(token) / columns,
                   column = static_cast<uint32_t>(token) - line * columns;
    const uint32_t frame = line / rows, row = line - frame * rows;
    const uint32_t row_entries = static_cast<uint32_t>(table_frames) * frame_pairs_;
    const uint32_t column_entries = row_entries + rows * row_pairs;
    frame_ = frame * frame_pairs_;
    row_ = row_entries + row * row_pairs - frame_pairs_;
    column_ = column_entries + column * column_pairs - row_pairs_end_;
  }

  // Rotates channels [d, d + kWidth) of a head, or back; d is even.
  template <int kWidth>
  __device__ __forceinline__ void rotate(float (&values)[kWidth], int32_t d, bool back = false) const {
    static_assert(kWidth % 2 == 0);
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const uint32_t pair = static_cast<uint32_t>(d) / 2 + i / 2;
      const float2 turn = __ldg(table_ + (pair + (pair < frame_pairs_     ? frame_
                                                  : pair < row_pairs_end_ ? row_
                                                                          : column_)));
      const float sine = back ? -turn.y : turn.y;
      const float real = values[i], imaginary = values[i + 1];
      values[i] = real * turn.x - imaginary * sine;
      values[i + 1] = real * sine + imaginary * turn.x;
    }
  }

 private:
  const float2* table_ = nullptr;
  uint32_t frame_pairs_ = 0, row_pairs_end_ = 0, frame_ = 0, row_ = 0, column_ = 0;
};

}  // namespace selfforcing
