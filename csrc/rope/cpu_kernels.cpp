// Rotary embedding kernels on the CPU, compiled once per instruction set.
#include <math.h>

#include "../simd/elements.h"
#include "../simd/sums.h"
#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

constexpr int kMaxHeadDim = 256;

// Tokens whose angles are gathered at a time; then every stream visits them, each its own stretch of memory, with
// angles gathered anew where it starts at another frame than the stream before.
constexpr int64_t kBlockTokens = 16;

// Cosines and signed sines of the D channels of consecutive tokens, gathered from the table (layout: cpu.cpp).
class Angles {
 public:
  explicit Angles(const RopeParams& params) : axes_(params.axes), stride_(params.head_dim + kLanes) {
    const RopeAxes table_axes = params.table_axes();
    for (int axis = 0; axis < 3; ++axis) rows_[axis] = params.table + 4 * table_axes.table_offset(axis);
  }

  // At most kBlockTokens tokens, from `first` on, of streams with this start.
  void gather(int64_t first, int64_t count, int64_t start) {
    const float* rows[] = {rows_[0] + 4 * start * axes_.table_offset(1), rows_[1], rows_[2]};
    int64_t position[3], rest = first;
    for (int axis = 2; axis >= 0; rest /= axes_.size[axis--]) position[axis] = rest % axes_.size[axis];
    for (int64_t token = 0; token < count; ++token) {
      float* to = values_ + token * 2 * stride_;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t width = 2 * axes_.pairs[axis];
        const float* from = rows[axis] + position[axis] * 2 * width;
        // Whole vectors: what is too much is overwritten by the next axis or lies between the rows.
        for (int64_t i = 0; i < width; i += kLanes) {
          Float32::narrow(to + i, Float32::widen(from + i));
          Float32::narrow(to + stride_ + i, Float32::widen(from + width + i));
        }
        to += width;
      }
      for (int axis = 2; axis >= 0 && ++position[axis] == axes_.size[axis]; --axis) position[axis] = 0;
    }
  }

  // x [D] of a gathered token, rotated: its elements from d on.
  SELFFORCING_INLINE Floats rotate(Floats x, int64_t token, int64_t d, int count) const {
    const float* cosines = values_ + token * 2 * stride_;
    return x * load<Float32>(cosines + d, count) + swap_pairs(x) * load<Float32>(cosines + stride_ + d, count);
  }

 private:
  const RopeAxes& axes_;
  const int64_t stride_;
  const float* rows_[3];
  alignas(64) float values_[kBlockTokens * 2 * (kMaxHeadDim + kLanes)];
};

template <typename Element, typename Pointer>
auto row_of(const Heads<Pointer>& x, int64_t batch, int64_t token) {
  using Storage = typename Element::Storage;
  const int64_t offset = batch * x.batch_stride + token * x.token_stride;
  if constexpr (__is_same(Pointer, const void*)) {
    return static_cast<const Storage*>(x.data) + offset;
  } else {
    return static_cast<Storage*>(x.data) + offset;
  }
}

// Calls visit(batch, first token, their number, angles) for blocks of the tokens [begin, end).
template <typename Visit>
SELFFORCING_INLINE void for_blocks(const RopeParams& params, int64_t begin, int64_t end, const Visit& visit) {
  Angles angles(params);
  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const int64_t count = end - first < kBlockTokens ? end - first : kBlockTokens;
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      const int64_t start = params.start_of(batch);
      if (batch == 0 || params.start_frame[start] != params.start_frame[params.start_of(batch - 1)])
        angles.gather(first, count, start);
      visit(batch, first, count, angles);
    }
  }
}

// The same for all tokens, in ranges of positions that threads share.
template <typename Visit>
void for_all_blocks(const RopeParams& params, const Visit& visit) {
  const int64_t row_elements = static_cast<int64_t>(params.batch) * params.num_heads * params.head_dim;
  for_ranges(params.parallel, params.axes.num_tokens(), row_elements, [&](int64_t begin, int64_t end) {
    for_blocks(params, begin, end, visit);
    finish_streaming();
  });
}

template <typename Element>
int64_t row_bytes(const RopeParams& params) {
  return params.num_heads * params.head_dim * int64_t{sizeof(typename Element::Storage)};
}

int64_t num_elements(const RopeParams& params) {
  return params.batch * params.axes.num_tokens() * params.num_heads * params.head_dim;
}

}  // namespace

void rope_3d(const RopeParams& params) {
  with_output(params.dtype, params.y.data, num_elements(params), params.head_dim, [&](auto element, auto output) {
    using Element = decltype(element);
    for_all_blocks(params, [&](int64_t batch, int64_t first, int64_t count, const Angles& angles) {
      for (int64_t place = 0; place < count; ++place) {
        auto* x = row_of<Element>(params.x, batch, first + place);
        auto* y = row_of<Element>(params.y, batch, first + place);
        for (int32_t head = 0; head < params.num_heads; ++head, x += params.x.head_stride, y += params.y.head_stride)
          for_lanes(params.head_dim, [&](int64_t d, int lanes) __attribute__((always_inline)) {
            prefetch(x + d, kPageBytes);
            const Floats rotated = angles.rotate(load<Element>(x + d, lanes), place, d, lanes);
            store<decltype(output)>(y + d, rotated, lanes);
          });
      }
    });
  });
}

namespace {

// Tokens first to first + Rows::count - 1 of a stream.
template <typename Element, typename Output, typename Rows>
SELFFORCING_INLINE void qk_norm_rope_rows(const QkNormRopeParams& params, int64_t batch, int64_t first,
                                          const Angles& angles, int64_t place) {
  const int64_t dim = params.head_dim, channels = params.num_heads * dim, stride = params.x.token_stride;
  const auto* x = row_of<Element>(params.x, batch, first);
  RowSums<Rows> squares;
  for_lanes_in_parts<Rows>(channels, [&](int64_t c, int count, int part) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows::count; ++row) {
      const Floats value = load<Element>(x + row * stride + c, count);
      squares.part(row, part) += value * value;
    }
  });
  float* rstd = params.rstd + batch * params.axes.num_tokens() + first;
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count; ++row) rstd[row] = 1.0f / sqrtf(squares.total(row) / channels + params.eps);
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count; ++row, x += stride) {
    auto* y = row_of<Element>(params.y, batch, first + row);
    const float* weight = params.weight;
    const float factor = rstd[row];
    for (int64_t at = 0; at < channels; at += dim, y += params.y.head_stride)
      for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
        prefetch(x + Rows::count * stride + at + d, kPageBytes);
        const Floats normed = load<Element>(x + at + d, count) * factor * load<Float32>(weight + at + d, count);
        store<Output>(y + d, angles.rotate(normed, place + row, d, count), count);
      });
  }
}

}  // namespace

void qk_norm_rope(const QkNormRopeParams& params) {
  // What is read again right away must not pass the caches by.
  const int64_t elements = params.after != nullptr ? 0 : num_elements(params);
  with_output(params.dtype, params.y.data, elements, params.head_dim, [&](auto element, auto output) {
    for_all_blocks(params, [&](int64_t batch, int64_t first, int64_t count, const Angles& angles) {
      for_rows(0, count, row_bytes<decltype(element)>(params), [&](auto rows, int64_t place) {
        qk_norm_rope_rows<decltype(element), decltype(output), decltype(rows)>(params, batch, first + place, angles,
                                                                               place);
      });
      if (params.after != nullptr) params.after(params.after_context, batch, first, count);
    });
  });
}

namespace {

// The gradient of the weight sums over all tokens: each range of positions sums its own, in blocks of kBlockTokens and
// the blocks in double, so that rounding does not grow with the sequence; ranges are added in order. Their number
// depends on sizes alone, so the bits do not depend on threads.
constexpr int64_t kMaxRanges = 32;

// Of one range, per channel: a double, the float of a block, and the floats of kSums tokens.
int64_t range_floats(int64_t channels) { return (3 + kSums) * channels; }

int64_t num_weight_ranges(const QkNormRopeBackwardParams& params) {
  const int64_t tokens = params.axes.num_tokens();
  const int64_t elements = tokens * params.batch * params.num_heads * params.head_dim;
  int64_t ranges = elements / kGrainElements;
  if (ranges > kMaxRanges) ranges = kMaxRanges;
  if (ranges > tokens) ranges = tokens;
  return ranges > 1 ? ranges : 1;
}

// Tokens first to first + Rows::count - 1 of a stream: writes their grad_x and adds to grad_weight [C] what they give
// to it. Scratch: Rows::count rows [C].
template <typename Element, typename Output, typename Rows>
void backward_rows(const QkNormRopeBackwardParams& params, int64_t batch, int64_t first, const Angles& angles,
                   int64_t place, float* grad_weight, float* scratch) {
  const int64_t dim = params.head_dim, channels = params.num_heads * dim, tokens = params.axes.num_tokens();
  const auto* grad_y = row_of<Element>(params.x, batch, first);
  const auto* x = row_of<Element>(params.features, batch, first);
  const auto* next_grad_y = grad_y + Rows::count * params.x.token_stride;
  const float* rstd = params.rstd + batch * tokens + first;
  RowSums<Rows> dot;
  for (int64_t at = 0; at < channels; at += dim, grad_y += params.x.head_stride)
    for_lanes_in_parts<Rows>(dim, [&](int64_t d, int count, int part) __attribute__((always_inline)) {
      const int64_t c = at + d;
      const Floats weight = load<Float32>(params.weight + c, count);
      Floats sum = load<Float32>(grad_weight + c, count);
#pragma GCC unroll 4
      for (int row = 0; row < Rows::count; ++row) {
        const Floats given = load<Element>(grad_y + row * params.x.token_stride + d, count);
        const Floats grad = angles.rotate(given, place + row, d, count);
        const Floats normed = load<Element>(x + row * params.features.token_stride + c, count) * rstd[row];
        const Floats weighted = grad * weight;
        sum += grad * normed;
        dot.part(row, part) += weighted * normed;
        store<Float32>(scratch + row * channels + c, weighted, count);
      }
      store<Float32>(grad_weight + c, sum, count);
    });
  auto* grad_x = static_cast<typename Element::Storage*>(params.grad_x) + (batch * tokens + first) * channels;
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count;
       ++row, grad_x += channels, scratch += channels, x += params.features.token_stride) {
    const float slope = rstd[row] * dot.total(row) / channels;
    for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
      const Floats along = load<Element>(x + c, count) * slope;
      prefetch(x + Rows::count * params.features.token_stride + c);
      prefetch(next_grad_y + row * params.x.token_stride + c);
      store<Output>(grad_x + c, rstd[row] * (load<Float32>(scratch + c, count) - along), count);
    });
  }
}

template <typename Element, typename Output>
void backward_range(const QkNormRopeBackwardParams& params, int64_t begin, int64_t end, float* workspace) {
  const int64_t channels = static_cast<int64_t>(params.num_heads) * params.head_dim;
  double* total = reinterpret_cast<double*>(workspace);
  float *grad_weight = workspace + 2 * channels, *scratch = workspace + 3 * channels;
  memset(total, 0, channels * sizeof(double));
  for_blocks(params, begin, end, [&](int64_t batch, int64_t first, int64_t block_tokens, const Angles& angles) {
    memset(grad_weight, 0, channels * sizeof(float));
    for_rows(0, block_tokens, row_bytes<Element>(params), [&](auto rows, int64_t place) {
      backward_rows<Element, Output, decltype(rows)>(params, batch, first + place, angles, place, grad_weight, scratch);
    });
    for (int64_t c = 0; c < channels; ++c) total[c] += grad_weight[c];
  });
  finish_streaming();
}

}  // namespace

int64_t qk_norm_rope_backward_workspace_floats(const QkNormRopeBackwardParams& params) {
  return num_weight_ranges(params) * range_floats(int64_t{params.num_heads} * params.head_dim);
}

void qk_norm_rope_backward(const QkNormRopeBackwardParams& params) {
  const int64_t channels = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t tokens = params.axes.num_tokens(), ranges = num_weight_ranges(params);
  Parallel parallel = params.parallel;
  if (num_elements(params) <= kSerialElements) parallel.num_threads = 1;
  parallel.for_each(ranges, [&](int64_t range, int32_t) {
    const int64_t begin = tokens * range / ranges, end = tokens * (range + 1) / ranges;
    with_output(params.dtype, params.grad_x, num_elements(params), channels, [&](auto element, auto output) {
      backward_range<decltype(element), decltype(output)>(params, begin, end,
                                                          params.workspace + range * range_floats(channels));
    });
  });
  double* total = reinterpret_cast<double*>(params.workspace);
  for (int64_t range = 1; range < ranges; ++range) {
    const double* more = reinterpret_cast<const double*>(params.workspace + range * range_floats(channels));
    for (int64_t c = 0; c < channels; ++c) total[c] += more[c];
  }
  for (int64_t c = 0; c < channels; ++c) params.grad_weight[c] = static_cast<float>(total[c]);
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
