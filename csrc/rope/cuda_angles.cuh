// Rotation of a token's channels by a table of cosines and sines on the GPU.
#pragma once
#include "../geometry/rope_axes.h"
#include "../ptx/device.cuh"

namespace selfforcing {

// The rows of a table (RopeAxes::table_offset) that turn one token, each moved so that it is indexed by the pair's
// number in the head.
class TokenAngles {
 public:
  TokenAngles() = default;

  // The table has rows for `table_frames` frames, of which those of the token's grid start at `first_frame`.
  __device__ __forceinline__ TokenAngles(const RopeAxes& axes, const float* table, int32_t token, int32_t table_frames,
                                         int32_t first_frame = 0)
      : frame_pairs_(axes.pairs[0]), row_pairs_end_(axes.pairs[0] + axes.pairs[1]) {
    const float2* rows = reinterpret_cast<const float2*>(table);
    const uint32_t line = static_cast<uint32_t>(token) / static_cast<uint32_t>(axes.size[2]);
    const uint32_t column = static_cast<uint32_t>(token) - line * static_cast<uint32_t>(axes.size[2]);
    const uint32_t frame = line / static_cast<uint32_t>(axes.size[1]);
    const uint32_t row = line - frame * static_cast<uint32_t>(axes.size[1]);
    frame_ = rows + static_cast<int64_t>(first_frame + static_cast<int32_t>(frame)) * axes.pairs[0];
    rows += static_cast<int64_t>(table_frames) * axes.pairs[0];
    row_ = rows + static_cast<int64_t>(row) * axes.pairs[1] - frame_pairs_;
    rows += static_cast<int64_t>(axes.size[1]) * axes.pairs[1];
    column_ = rows + static_cast<int64_t>(column) * axes.pairs[2] - row_pairs_end_;
  }

  // Rotates channels [d, d + kWidth) of a head, or back; d is even.
  template <int kWidth>
  __device__ __forceinline__ void rotate(float (&values)[kWidth], int32_t d, bool back = false) const {
    static_assert(kWidth % 2 == 0);
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      const int32_t pair = (d + i) / 2;
      const float2 turn = __ldg((pair < frame_pairs_ ? frame_ : pair < row_pairs_end_ ? row_ : column_) + pair);
      const float sine = back ? -turn.y : turn.y;
      const float real = values[i], imaginary = values[i + 1];
      values[i] = real * turn.x - imaginary * sine;
      values[i + 1] = real * sine + imaginary * turn.x;
    }
  }

 private:
  int32_t frame_pairs_ = 0, row_pairs_end_ = 0;
  const float2 *frame_ = nullptr, *row_ = nullptr, *column_ = nullptr;
};

}  // namespace selfforcing
