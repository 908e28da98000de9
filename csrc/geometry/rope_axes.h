// How the channel pairs of a head are shared among frame, row and column, and how far each pair turns per step, as in
// Wan2.1 (RoFormer, arXiv 2104.09864, section 3.2, on three axes). Host and device read the same definition.
#pragma once
#include <math.h>

#include <cstdint>

#include "host_device.h"

namespace selfforcing {

inline constexpr double kRopeBase = 10000.0;

// Tokens are ordered (frame, row, column). Pair j of a head is channels 2j and 2j + 1; the first pairs[0] turn with the
// frame, the next pairs[1] with the row, the last pairs[2] with the column.
struct RopeAxes {
  int32_t size[3] = {0, 0, 0};   // tokens along each axis
  int32_t pairs[3] = {0, 0, 0};  // channel pairs of each axis

  RopeAxes() = default;
  RopeAxes(int32_t frames, int32_t rows, int32_t columns, int32_t head_dim) : size{frames, rows, columns} {
    pairs[1] = pairs[2] = head_dim / 6;
    pairs[0] = head_dim / 2 - 2 * (head_dim / 6);
  }

  SELFFORCING_HOST_DEVICE int64_t num_tokens() const { return static_cast<int64_t>(size[0]) * size[1] * size[2]; }

  // A table with one row per position of each axis, of pairs[axis] entries: the entries before those of an axis, and
  // all.
  SELFFORCING_HOST_DEVICE int64_t table_offset(int32_t axis) const {
    int64_t entries = 0;
    for (int32_t a = 0; a < axis; ++a) entries += static_cast<int64_t>(size[a]) * pairs[a];
    return entries;
  }
  SELFFORCING_HOST_DEVICE int64_t table_entries() const { return table_offset(3); }

  // Radians per step of the j-th pair of an axis.
  SELFFORCING_HOST_DEVICE double frequency(int32_t axis, int32_t j) const {
    return pow(kRopeBase, -static_cast<double>(j) / pairs[axis]);
  }
};

}  // namespace selfforcing
