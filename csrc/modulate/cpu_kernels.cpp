// Modulation kernels on the CPU, compiled once per instruction set.
#include <math.h>

#include "../simd/elements.h"
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

// Calls visit(batch, token, frame) for all tokens, in ranges that threads share.
template <typename Visit>
void for_tokens(const FeatureShape& shape, const Parallel& parallel, const Visit& visit) {
  const int64_t tokens = static_cast<int64_t>(shape.frames) * shape.frame_seqlen;
  for_ranges(parallel, shape.batch * tokens, shape.channels, [&](int64_t row, int64_t end) {
    while (row < end) {
      const int64_t frame = row / shape.frame_seqlen, frame_end = (frame + 1) * shape.frame_seqlen;
      const int64_t batch = frame / shape.frames;
      for (const int64_t stop = frame_end < end ? frame_end : end; row < stop; ++row)
        visit(batch, row - batch * tokens, frame % shape.frames);
    }
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

SELFFORCING_INLINE void add_to(float* sums, int64_t c, Floats x, int count) {
  store<Float32>(sums + c, load<Float32>(sums + c, count) + x, count);
}

// visit(batch, token, frame, sums) adds one token to sums [width]; finish(index of the frame in [B, F], totals) gets
// the sums of a frame.
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
    for (int64_t token = first + shape.frame_seqlen * range / ranges; token < end;) {
      memset(block, 0, width * sizeof(float));
      const int64_t block_end = token + kBlockTokens < end ? token + kBlockTokens : end;
      for (; token < block_end; ++token) visit(batch, token, frame, block);
      for (int64_t c = 0; c < width; ++c) total[c] += block[c];
    }
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

}  // namespace

void modulated_layer_norm(const ModulatedLayerNormParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t channels = params.shape.channels;
    const int64_t tokens = static_cast<int64_t>(params.shape.frames) * params.shape.frame_seqlen;
    for_tokens(params.shape, params.parallel, [&](int64_t batch, int64_t token, int64_t frame) {
      const auto* x = row_of<Element>(params.x, batch, token);
      auto* y = row_of<Element>(params.y, batch, token);
      const float* shift = params.shift.row(batch, frame);
      const float* scale = params.scale.row(batch, frame);
      Floats sum{}, rest{}, squares{};
      for_lanes(channels,
                [&](int64_t c, int count) __attribute__((always_inline)) { sum += load<Element>(x + c, count); });
      const float rough_mean = sum_lanes(sum) / channels;
      // The second pass (the row is in the first-level cache) avoids the cancellation of E[x^2] - E[x]^2, and what is
      // left of the mean after subtracting it corrects its rounding.
      for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const Floats centered = keep_lanes(load<Element>(x + c, count) - rough_mean, count);
        rest += centered;
        squares += centered * centered;
      });
      const float correction = sum_lanes(rest) / channels, mean = rough_mean + correction;
      const float variance = sum_lanes(squares) / channels - correction * correction;
      const float rstd = 1.0f / sqrtf((variance > 0.0f ? variance : 0.0f) + params.eps);
      params.mean[batch * tokens + token] = mean;
      params.rstd[batch * tokens + token] = rstd;
      for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const Floats normed = (load<Element>(x + c, count) - mean) * rstd;
        store<Element>(y + c, normed * (1.0f + load<Float32>(scale + c, count)) + load<Float32>(shift + c, count),
                       count);
      });
    });
  });
}

int64_t modulated_layer_norm_backward_workspace_floats(const FeatureShape& shape) {
  return sums_workspace_floats(shape, 2 * int64_t{shape.channels});
}

void modulated_layer_norm_backward(const ModulatedLayerNormBackwardParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t channels = params.shape.channels;
    const int64_t tokens = static_cast<int64_t>(params.shape.frames) * params.shape.frame_seqlen;
    sum_frames(
        params.shape, params.parallel, params.workspace, 2 * channels,
        [&](int64_t batch, int64_t token, int64_t frame, float* sums) {
          const auto* grad_y = row_of<Element>(params.grad_y, batch, token);
          const auto* x = row_of<Element>(params.x, batch, token);
          auto* grad_x = row_of<Element>(params.grad_x, batch, token);
          const float* scale = params.scale.row(batch, frame);
          const float mean = params.mean[batch * tokens + token], rstd = params.rstd[batch * tokens + token];
          Floats sum{}, dot{};
          for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Floats grad = load<Element>(grad_y + c, count);
            const Floats normed = (load<Element>(x + c, count) - mean) * rstd;
            const Floats scaled = grad * (1.0f + load<Float32>(scale + c, count));
            add_to(sums, c, grad, count);
            add_to(sums + channels, c, grad * normed, count);
            sum += scaled;
            dot += scaled * normed;
          });
          const float mean_grad = sum_lanes(sum) / channels, mean_dot = sum_lanes(dot) / channels;
          for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Floats normed = (load<Element>(x + c, count) - mean) * rstd;
            const Floats scaled = load<Element>(grad_y + c, count) * (1.0f + load<Float32>(scale + c, count));
            store<Element>(grad_x + c, rstd * (scaled - mean_grad - normed * mean_dot), count);
          });
        },
        [&](int64_t frame, const double* totals) {
          round_to(params.grad_shift + frame * channels, totals, channels);
          round_to(params.grad_scale + frame * channels, totals + channels, channels);
        });
  });
}

void gated_residual(const GatedResidualParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    for_tokens(params.shape, params.parallel, [&](int64_t batch, int64_t token, int64_t frame) {
      const auto* x = row_of<Element>(params.x, batch, token);
      const auto* y = row_of<Element>(params.y, batch, token);
      auto* out = row_of<Element>(params.out, batch, token);
      const float* gate = params.gate.row(batch, frame);
      for_lanes(params.shape.channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        store<Element>(
            out + c, load<Element>(x + c, count) + load<Element>(y + c, count) * load<Float32>(gate + c, count), count);
      });
    });
  });
}

int64_t gated_residual_backward_workspace_floats(const FeatureShape& shape) {
  return sums_workspace_floats(shape, shape.channels);
}

void gated_residual_backward(const GatedResidualBackwardParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t channels = params.shape.channels;
    sum_frames(
        params.shape, params.parallel, params.workspace, channels,
        [&](int64_t batch, int64_t token, int64_t frame, float* sums) {
          const auto* grad_out = row_of<Element>(params.grad_out, batch, token);
          const auto* y = row_of<Element>(params.y, batch, token);
          auto* grad_y = row_of<Element>(params.grad_y, batch, token);
          const float* gate = params.gate.row(batch, frame);
          for_lanes(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
            const Floats grad = load<Element>(grad_out + c, count);
            store<Element>(grad_y + c, grad * load<Float32>(gate + c, count), count);
            add_to(sums, c, grad * load<Element>(y + c, count), count);
          });
        },
        [&](int64_t frame, const double* totals) { round_to(params.grad_gate + frame * channels, totals, channels); });
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
