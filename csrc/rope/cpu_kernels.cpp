// Rotary embedding kernels on the CPU, compiled once per instruction set.
#include <math.h>

#include "../simd/elements.h"
#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

constexpr int kMaxHeadDim = 256;

// Cosines and signed sines of one token's D channels, gathered from the table (layout: cpu.cpp). Tokens are visited in
// order, so most steps only change the part of the column.
class TokenAngles {
 public:
  TokenAngles(const RopeParams& params, int64_t token) : axes_(params.axes) {
    int64_t rest = token;
    for (int axis = 2; axis >= 0; --axis) {
      position_[axis] = rest % axes_.size[axis];
      rest = rest / axes_.size[axis];
      rows_[axis] = params.table + 4 * axes_.table_offset(axis);
    }
    for (int axis = 0; axis < 3; ++axis) gather(axis);
  }

  const float* cosines() const { return cosines_; }
  const float* sines() const { return sines_; }

  void next() {
    for (int axis = 2; axis >= 0; --axis) {
      const bool carry = ++position_[axis] == axes_.size[axis];
      if (carry) position_[axis] = 0;
      if (!carry || axis > 0) gather(axis);
      if (!carry) return;
    }
  }

 private:
  void gather(int axis) {
    const int width = 2 * axes_.pairs[axis];
    const int first = axis == 0 ? 0 : axis == 1 ? 2 * axes_.pairs[0] : 2 * (axes_.pairs[0] + axes_.pairs[1]);
    const float* row = rows_[axis] + position_[axis] * 2 * width;
    memcpy(cosines_ + first, row, width * sizeof(float));
    memcpy(sines_ + first, row + width, width * sizeof(float));
  }

  const RopeAxes& axes_;
  int64_t position_[3];
  const float* rows_[3];
  alignas(64) float cosines_[kMaxHeadDim];
  alignas(64) float sines_[kMaxHeadDim];
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

// Calls visit(batch, token, angles) for all tokens in ranges of positions; streams share a position's angles.
template <typename Visit>
void for_tokens(const RopeParams& params, const Visit& visit) {
  const int64_t row_elements = static_cast<int64_t>(params.batch) * params.num_heads * params.head_dim;
  for_ranges(params.parallel, params.axes.num_tokens(), row_elements, [&](int64_t begin, int64_t end) {
    TokenAngles angles(params, begin);
    for (int64_t token = begin; token < end; ++token, angles.next())
      for (int64_t batch = 0; batch < params.batch; ++batch) visit(batch, token, angles);
  });
}

SELFFORCING_INLINE Floats rotate(Floats x, const TokenAngles& angles, int64_t d, int count) {
  return x * load<Float32>(angles.cosines() + d, count) + swap_pairs(x) * load<Float32>(angles.sines() + d, count);
}

template <typename Element>
float root_mean_square_reciprocal(const typename Element::Storage* x, int64_t channels, float eps) {
  Floats sum{};
  for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
    const Floats value = load<Element>(x + c, count);
    sum += value * value;
  });
  return 1.0f / sqrtf(sum_lanes(sum) / channels + eps);
}

}  // namespace

void rope_3d(const RopeParams& params) {
  with_element(params.dtype, [&](auto element) {
    using Element = decltype(element);
    for_tokens(params, [&](int64_t batch, int64_t token, const TokenAngles& angles) {
      auto* x = row_of<Element>(params.x, batch, token);
      auto* y = row_of<Element>(params.y, batch, token);
      for (int32_t head = 0; head < params.num_heads; ++head, x += params.x.head_stride, y += params.y.head_stride)
        for_lanes(params.head_dim, [&](int64_t d, int count) __attribute__((always_inline)) {
          store<Element>(y + d, rotate(load<Element>(x + d, count), angles, d, count), count);
        });
    });
  });
}

void qk_norm_rope(const QkNormRopeParams& params) {
  with_element(params.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t dim = params.head_dim, channels = params.num_heads * dim;
    for_tokens(params, [&](int64_t batch, int64_t token, const TokenAngles& angles) {
      auto* x = row_of<Element>(params.x, batch, token);
      auto* y = row_of<Element>(params.y, batch, token);
      const float rstd = root_mean_square_reciprocal<Element>(x, channels, params.eps);
      params.rstd[batch * params.axes.num_tokens() + token] = rstd;
      const float* weight = params.weight;
      for (int32_t head = 0; head < params.num_heads; ++head, x += dim, y += params.y.head_stride, weight += dim)
        for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
          const Floats normed = load<Element>(x + d, count) * rstd * load<Float32>(weight + d, count);
          store<Element>(y + d, rotate(normed, angles, d, count), count);
        });
    });
  });
}

namespace {

// The gradient of the weight sums over all tokens: each range of positions sums its own, in blocks of kBlockTokens and
// the blocks in double, so that rounding does not grow with the sequence; ranges are added in order. Their number
// depends on sizes alone, so the bits do not depend on threads.
constexpr int64_t kMaxRanges = 32;
constexpr int64_t kBlockTokens = 16;

// Of one range: a double and two floats per channel.
int64_t range_floats(int64_t channels) { return 4 * channels; }

int64_t num_weight_ranges(const QkNormRopeBackwardParams& params) {
  const int64_t tokens = params.axes.num_tokens();
  const int64_t elements = tokens * params.batch * params.num_heads * params.head_dim;
  int64_t ranges = elements / kGrainElements;
  if (ranges > kMaxRanges) ranges = kMaxRanges;
  if (ranges > tokens) ranges = tokens;
  return ranges > 1 ? ranges : 1;
}

template <typename Element>
void backward_range(const QkNormRopeBackwardParams& params, int64_t begin, int64_t end, float* workspace) {
  const int64_t dim = params.head_dim, channels = params.num_heads * dim, tokens = params.axes.num_tokens();
  double* total = reinterpret_cast<double*>(workspace);
  float* block = workspace + 2 * channels;
  float* grad_normed = workspace + 3 * channels;  // of one token
  memset(total, 0, channels * sizeof(double));
  memset(block, 0, channels * sizeof(float));
  const auto close_block = [&] {
    for (int64_t c = 0; c < channels; ++c) total[c] += block[c];
    memset(block, 0, channels * sizeof(float));
  };

  TokenAngles angles(params, begin);
  int64_t in_block = 0;
  for (int64_t token = begin; token < end; ++token, angles.next()) {
    for (int64_t batch = 0; batch < params.batch; ++batch) {
      auto* grad_y = row_of<Element>(params.x, batch, token);
      auto* x = row_of<Element>(params.features, batch, token);
      const float rstd = params.rstd[batch * tokens + token];
      Floats dot_lanes{};
      for (int64_t at = 0; at < channels; at += dim, grad_y += params.x.head_stride)
        for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
          const int64_t c = at + d;
          const Floats grad = rotate(load<Element>(grad_y + d, count), angles, d, count);
          const Floats normed = load<Element>(x + c, count) * rstd;
          const Floats weighted = grad * load<Float32>(params.weight + c, count);
          store<Float32>(block + c, load<Float32>(block + c, count) + grad * normed, count);
          store<Float32>(grad_normed + c, weighted, count);
          dot_lanes += weighted * normed;
        });
      const float mean_dot = sum_lanes(dot_lanes) / channels;
      auto* grad_x = static_cast<typename Element::Storage*>(params.grad_x) + (batch * tokens + token) * channels;
      for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const Floats normed = load<Element>(x + c, count) * rstd;
        store<Element>(grad_x + c, rstd * (load<Float32>(grad_normed + c, count) - normed * mean_dot), count);
      });
      if (++in_block == kBlockTokens) {
        close_block();
        in_block = 0;
      }
    }
  }
  close_block();
}

}  // namespace

int64_t qk_norm_rope_backward_workspace_floats(const QkNormRopeBackwardParams& params) {
  return num_weight_ranges(params) * range_floats(int64_t{params.num_heads} * params.head_dim);
}

void qk_norm_rope_backward(const QkNormRopeBackwardParams& params) {
  const int64_t channels = static_cast<int64_t>(params.num_heads) * params.head_dim;
  const int64_t tokens = params.axes.num_tokens(), ranges = num_weight_ranges(params);
  Parallel parallel = params.parallel;
  if (tokens * params.batch * channels <= kSerialElements) parallel.num_threads = 1;
  parallel.for_each(ranges, [&](int64_t range, int32_t) {
    const int64_t begin = tokens * range / ranges, end = tokens * (range + 1) / ranges;
    with_element(params.dtype, [&](auto element) {
      backward_range<decltype(element)>(params, begin, end, params.workspace + range * range_floats(channels));
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
