// Modulation kernels on the CPU, compiled once per instruction set.
#include <math.h>

#include "../simd/elements.h"
#include "../simd/sums.h"
#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

template <typename Element>
const typename Element::Storage* row_of(const ConstFeatures& x, int64_t batch, int64_t token) {
  return static_cast<const typename Element::Storage*>(x.data) + batch * x.batch_stride + token * x.token_stride;
}

template <typename Element>
typename Element::Storage* row_of(const MutableFeatures& x, int64_t batch, int64_t token) {
  return static_cast<typename Element::Storage*>(x.data) + batch * x.batch_stride + token * x.token_stride;
}

int64_t num_elements(const FeatureShape& shape) {
  return static_cast<int64_t>(shape.batch) * shape.frames * shape.frame_seqlen * shape.channels;
}

// Calls visit(batch, frame, first token, end) for all tokens, in ranges that threads share.
template <typename Visit>
void for_tokens(const FeatureShape& shape, const Parallel& parallel, const Visit& visit) {
  const int64_t tokens = static_cast<int64_t>(shape.frames) * shape.frame_seqlen;
  for_ranges(parallel, shape.batch * tokens, shape.channels, [&](int64_t row, int64_t end) {
    while (row < end) {
      const int64_t frame = row / shape.frame_seqlen, frame_end = (frame + 1) * shape.frame_seqlen;
      const int64_t batch = frame / shape.frames, stop = frame_end < end ? frame_end : end;
      visit(batch, frame % shape.frames, row - batch * tokens, stop - batch * tokens);
      row = stop;
    }
    finish_streaming();
  });
}

// Gradients of a frame's modulation sum over the frame's tokens. A frame is split into ranges when there are few
// frames, by sizes alone, so that the bits do not depend on threads. Each range sums `width` floats in blocks of
// kBlockTokens and the blocks in double, so that rounding does not grow with the frame; ranges are added in order.
constexpr int64_t kWantedRanges = 16;
constexpr int64_t kBlockTokens = 16;

int64_t ranges_per_frame(const FeatureShape& shape) {
  const int64_t frames = static_cast<int64_t>(shape.batch) * shape.frames;
  const int64_t work = static_cast<int64_t>(shape.frame_seqlen) * shape.channels / kGrainElements;
  int64_t ranges = frames > 0 ? (kWantedRanges + frames - 1) / frames : 1;
  if (ranges > work) ranges = work;
  return ranges > 1 ? ranges : 1;
}

// Of one range: `width` doubles, then `width` floats.
int64_t range_floats(int64_t width) { return 3 * width + width % 2; }

int64_t sums_workspace_floats(const FeatureShape& shape, int64_t width) {
  return shape.batch * shape.frames * ranges_per_frame(shape) * range_floats(width);
}

// visit(batch, frame, first token, end, sums) adds these tokens to sums [width]; finish(index of the frame in [B, F],
// totals) gets the sums of a frame.
template <typename Visit, typename Finish>
void sum_frames(const FeatureShape& shape, const Parallel& threads, float* workspace, int64_t width, const Visit& visit,
                const Finish& finish) {
  const int64_t frames = static_cast<int64_t>(shape.batch) * shape.frames, ranges = ranges_per_frame(shape);
  Parallel parallel = threads;
  if (frames * shape.frame_seqlen * shape.channels <= kSerialElements) parallel.num_threads = 1;
  parallel.for_each(frames * ranges, [&](int64_t item, int32_t) {
    double* total = reinterpret_cast<double*>(workspace + item * range_floats(width));
    float* block = reinterpret_cast<float*>(total + width);
    memset(total, 0, width * sizeof(double));
    const int64_t range = item % ranges, batch = item / ranges / shape.frames, frame = item / ranges % shape.frames;
    const int64_t first = frame * shape.frame_seqlen;
    const int64_t end = first + shape.frame_seqlen * (range + 1) / ranges;
    for (int64_t token = first + shape.frame_seqlen * range / ranges; token < end; token += kBlockTokens) {
      memset(block, 0, width * sizeof(float));
      visit(batch, frame, token, token + kBlockTokens < end ? token + kBlockTokens : end, block);
      for (int64_t c = 0; c < width; ++c) total[c] += block[c];
    }
    finish_streaming();
  });
  for (int64_t frame = 0; frame < frames; ++frame) {
    const auto of_range = [&](int64_t range) {
      return reinterpret_cast<double*>(workspace + (frame * ranges + range) * range_floats(width));
    };
    double* total = of_range(0);
    for (int64_t range = 1; range < ranges; ++range)
      for (int64_t c = 0; c < width; ++c) total[c] += of_range(range)[c];
    finish(frame, total);
  }
}

SELFFORCING_INLINE void round_to(float* to, const double* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename Element>
int64_t row_bytes(const FeatureShape& shape) {
  return shape.channels * int64_t{sizeof(typename Element::Storage)};
}

// Tokens first to first + Rows::count - 1 of a frame.
template <typename Element, typename Output, typename Rows>
SELFFORCING_INLINE void normalise(const ModulatedLayerNormParams& params, int64_t batch, int64_t frame, int64_t first) {
  const int64_t channels = params.shape.channels, stride = params.x.token_stride;
  const auto* x = row_of<Element>(params.x, batch, first);
  RowSums<Rows> sum, rest, squares;
  for_lanes_in_parts<Rows>(channels, [&](int64_t c, int count, int part) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows::count; ++row) sum.part(row, part) += load<Element>(x + row * stride + c, count);
  });
  float mean[Rows::count], rstd[Rows::count];
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count; ++row) mean[row] = sum.total(row) / channels;
  // The second pass (the rows are in the first-level cache) avoids the cancellation of E[x^2] - E[x]^2, and what is
  // left of the mean after subtracting it corrects its rounding.
  for_lanes_in_parts<Rows>(channels, [&](int64_t c, int count, int part) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int row = 0; row < Rows::count; ++row) {
      const Floats centered = keep_lanes(load<Element>(x + row * stride + c, count) - mean[row], count);
      rest.part(row, part) += centered;
      squares.part(row, part) += centered * centered;
    }
  });
  const int64_t index = batch * params.shape.frames * int64_t{params.shape.frame_seqlen} + first;
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count; ++row) {
    const float correction = rest.total(row) / channels;
    const float variance = squares.total(row) / channels - correction * correction;
    params.mean[index + row] = mean[row] += correction;
    params.rstd[index + row] = rstd[row] = 1.0f / sqrtf((variance > 0.0f ? variance : 0.0f) + params.eps);
  }
  auto* y = row_of<Element>(params.y, batch, first);
  const float *shift = params.shift.row(batch, frame), *scale = params.scale.row(batch, frame);
  for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
    const Floats factor = 1.0f + load<Float32>(scale + c, count), offset = load<Float32>(shift + c, count);
#pragma GCC unroll 4
    for (int row = 0; row < Rows::count; ++row) {
      const auto* at = x + row * stride + c;
      prefetch(at + Rows::count * stride);
      const Floats normed = (load<Element>(at, count) - mean[row]) * rstd[row];
      store<Output>(y + row * params.y.token_stride + c, normed * factor + offset, count);
    }
  });
}

// The same tokens in backward; adds to grad_shift and grad_scale [C] what they give to them.
template <typename Element, typename Output, typename Rows>
SELFFORCING_INLINE void normalise_backward(const ModulatedLayerNormBackwardParams& params, int64_t batch, int64_t frame,
                                           int64_t first, float* grad_shift, float* grad_scale) {
  const int64_t channels = params.shape.channels;
  const int64_t x_stride = params.x.token_stride, grad_stride = params.grad_y.token_stride;
  const int64_t index = batch * params.shape.frames * int64_t{params.shape.frame_seqlen} + first;
  const auto* x = row_of<Element>(params.x, batch, first);
  const auto* grad_y = row_of<Element>(params.grad_y, batch, first);
  const float *mean = params.mean + index, *rstd = params.rstd + index, *scale = params.scale.row(batch, frame);
  RowSums<Rows> sum, dot;
  for_lanes_in_parts<Rows>(channels, [&](int64_t c, int count, int part) __attribute__((always_inline)) {
    const Floats factor = 1.0f + load<Float32>(scale + c, count);
    Floats shift_sum = load<Float32>(grad_shift + c, count), scale_sum = load<Float32>(grad_scale + c, count);
#pragma GCC unroll 4
    for (int row = 0; row < Rows::count; ++row) {
      const Floats grad = load<Element>(grad_y + row * grad_stride + c, count), scaled = grad * factor;
      const Floats normed = (load<Element>(x + row * x_stride + c, count) - mean[row]) * rstd[row];
      shift_sum += grad;
      scale_sum += grad * normed;
      sum.part(row, part) += scaled;
      dot.part(row, part) += scaled * normed;
    }
    store<Float32>(grad_shift + c, shift_sum, count);
    store<Float32>(grad_scale + c, scale_sum, count);
  });
#pragma GCC unroll 4
  for (int row = 0; row < Rows::count; ++row, x += x_stride, grad_y += grad_stride) {
    auto* grad_x = row_of<Element>(params.grad_x, batch, first + row);
    const float mean_grad = sum.total(row) / channels, slope = rstd[row] * dot.total(row) / channels;
    for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
      prefetch(x + Rows::count * x_stride + c);
      prefetch(grad_y + Rows::count * grad_stride + c);
      const Floats scaled = load<Element>(grad_y + c, count) * (1.0f + load<Float32>(scale + c, count));
      const Floats along = (load<Element>(x + c, count) - mean[row]) * slope;
      store<Output>(grad_x + c, rstd[row] * ((scaled - mean_grad) - along), count);
    });
  }
}

}  // namespace

void modulated_layer_norm(const ModulatedLayerNormParams& params) {
  const FeatureShape& shape = params.shape;
  with_output(shape.dtype, params.y.data, num_elements(shape), shape.channels, [&](auto element, auto output) {
    using Element = decltype(element);
    for_tokens(shape, params.parallel, [&](int64_t batch, int64_t frame, int64_t begin, int64_t end) {
      for_rows(begin, end, row_bytes<Element>(shape), [&](auto rows, int64_t first) {
        normalise<Element, decltype(output), decltype(rows)>(params, batch, frame, first);
      });
    });
  });
}

int64_t modulated_layer_norm_backward_workspace_floats(const FeatureShape& shape) {
  return sums_workspace_floats(shape, 2 * int64_t{shape.channels});
}

void modulated_layer_norm_backward(const ModulatedLayerNormBackwardParams& params) {
  const FeatureShape& shape = params.shape;
  const int64_t channels = shape.channels;
  with_output(shape.dtype, params.grad_x.data, num_elements(shape), channels, [&](auto element, auto output) {
    using Element = decltype(element);
    sum_frames(
        shape, params.parallel, params.workspace, 2 * channels,
        [&](int64_t batch, int64_t frame, int64_t begin, int64_t end, float* sums) {
          for_rows(begin, end, row_bytes<Element>(shape), [&](auto rows, int64_t first) {
            normalise_backward<Element, decltype(output), decltype(rows)>(params, batch, frame, first, sums,
                                                                          sums + channels);
          });
        },
        [&](int64_t frame, const double* totals) {
          round_to(params.grad_shift + frame * channels, totals, channels);
          round_to(params.grad_scale + frame * channels, totals + channels, channels);
        });
  });
}

void gated_residual(const GatedResidualParams& params) {
  const FeatureShape& shape = params.shape;
  with_output(shape.dtype, params.out.data, num_elements(shape), shape.channels, [&](auto element, auto output) {
    using Element = decltype(element);
    for_tokens(shape, params.parallel, [&](int64_t batch, int64_t frame, int64_t begin, int64_t end) {
      const float* gate = params.gate.row(batch, frame);
      for (int64_t token = begin; token < end; ++token) {
        const auto* x = row_of<Element>(params.x, batch, token);
        const auto* y = row_of<Element>(params.y, batch, token);
        auto* out = row_of<Element>(params.out, batch, token);
        for_lanes(shape.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
          const Floats gated = load<Element>(y + c, count) * load<Float32>(gate + c, count);
          store<decltype(output)>(out + c, load<Element>(x + c, count) + gated, count);
        });
      }
    });
  });
}

int64_t gated_residual_backward_workspace_floats(const FeatureShape& shape) {
  return sums_workspace_floats(shape, shape.channels);
}

void gated_residual_backward(const GatedResidualBackwardParams& params) {
  const FeatureShape& shape = params.shape;
  const int64_t channels = shape.channels;
  with_output(shape.dtype, params.grad_y.data, num_elements(shape), channels, [&](auto element, auto output) {
    using Element = decltype(element);
    sum_frames(
        shape, params.parallel, params.workspace, channels,
        [&](int64_t batch, int64_t frame, int64_t begin, int64_t end, float* sums) {
          const float* gate = params.gate.row(batch, frame);
          for (int64_t token = begin; token < end; ++token) {
            const auto* grad_out = row_of<Element>(params.grad_out, batch, token);
            const auto* y = row_of<Element>(params.y, batch, token);
            auto* grad_y = row_of<Element>(params.grad_y, batch, token);
            for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
              const Floats grad = load<Element>(grad_out + c, count);
              store<decltype(output)>(grad_y + c, grad * load<Float32>(gate + c, count), count);
              store<Float32>(sums + c, load<Float32>(sums + c, count) + grad * load<Element>(y + c, count), count);
            });
          }
        },
        [&](int64_t frame, const double* totals) { round_to(params.grad_gate + frame * channels, totals, channels); });
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
