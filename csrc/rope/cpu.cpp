// Rotary embedding on the CPU: fills the table, then hands the call to the kernels of the active instruction set.
#include <math.h>

#include <algorithm>

#include "../simd/isa.h"
#include "params.h"

namespace selfforcing {

SELFFORCING_DECLARE_ISA(void rope_3d(const RopeParams& params))
SELFFORCING_DECLARE_ISA(void qk_norm_rope(const QkNormRopeParams& params))
SELFFORCING_DECLARE_ISA(int64_t qk_norm_rope_backward_workspace_floats(const QkNormRopeBackwardParams& params))
SELFFORCING_DECLARE_ISA(void qk_norm_rope_backward(const QkNormRopeBackwardParams& params))

namespace {

// For every position of every axis of the table a row of 2 * pairs cosines (c0, c0, c1, c1, ...) and a row of as many
// signed sines (-s0, s0, -s1, s1, ...): then y = x cosines + swap_pairs(x) sines.
constexpr int64_t kFloatsPerEntry = 4;

// Kernels read whole vectors from a row, also of the last one.
constexpr int64_t kPadding = 16;

// Positions from `first` on follow each other, so cosine and sine of the next come from rotating by one step in double:
// the error after n steps is about n * 1e-16, and a call costs a few sincos per pair instead of one per entry.
void fill_rows(const RopeAxes& axes, int32_t axis, int32_t first, bool inverse, float* rows) {
  const int64_t width = 2 * static_cast<int64_t>(axes.pairs[axis]);
  for (int32_t j = 0; j < axes.pairs[axis]; ++j) {
    const double frequency = axes.frequency(axis, j), start = frequency * first;
    const double step_cos = cos(frequency), step_sin = inverse ? -sin(frequency) : sin(frequency);
    double cosine = cos(start), sine = inverse ? -sin(start) : sin(start);
    for (int32_t position = 0; position < axes.size[axis]; ++position) {
      float* cosines = rows + position * 2 * width + 2 * j;
      float* sines = cosines + width;
      cosines[0] = cosines[1] = static_cast<float>(cosine);
      sines[1] = static_cast<float>(sine);
      sines[0] = -sines[1];
      const double next = cosine * step_cos - sine * step_sin;
      sine = sine * step_cos + cosine * step_sin;
      cosine = next;
    }
  }
}

// The params with their table filled. Starts that are all equal are one, so that streams share their angles.
template <typename Params>
Params with_table(Params params) {
  const int32_t* starts = params.start_frame;
  if (std::all_of(starts, starts + params.num_starts, [&](int32_t start) { return start == starts[0]; }))
    params.num_starts = 1;
  const RopeAxes& axes = params.axes;
  const RopeAxes table_axes = params.table_axes();
  const int64_t frame_floats = kFloatsPerEntry * axes.table_offset(1);
  for (int32_t i = 0; i < params.num_starts; ++i)
    fill_rows(axes, 0, starts[i], params.inverse, params.table + i * frame_floats);
  for (const int32_t axis : {1, 2})
    fill_rows(axes, axis, 0, params.inverse, params.table + kFloatsPerEntry * table_axes.table_offset(axis));
  return params;
}

}  // namespace

int64_t rope_table_floats_cpu(const RopeParams& params) {
  return kFloatsPerEntry * params.table_axes().table_entries() + kPadding;
}

void rope_3d_cpu(const RopeParams& params) { SELFFORCING_DISPATCH(rope_3d, with_table(params)); }

void qk_norm_rope_cpu(const QkNormRopeParams& params) { SELFFORCING_DISPATCH(qk_norm_rope, with_table(params)); }

int64_t qk_norm_rope_backward_workspace_floats_cpu(const QkNormRopeBackwardParams& params) {
  SELFFORCING_DISPATCH(qk_norm_rope_backward_workspace_floats, params);
}

void qk_norm_rope_backward_cpu(const QkNormRopeBackwardParams& params) {
  SELFFORCING_DISPATCH(qk_norm_rope_backward, with_table(params));
}

}  // namespace selfforcing
