// Modulation kernels. Rows (tokens) are taken by a warp each; sums over the tokens of a frame by blocks that go down
// columns (ptx/sums.cuh).
#include <type_traits>

#include "../ptx/elements.cuh"
#include "../ptx/sums.cuh"
#include "params.h"

namespace selfforcing {
namespace {

constexpr int kWarps = 4;  // tokens per block
constexpr int kThreads = kWarps * ptx::kWarpSize;
constexpr int32_t kRangeTokens = 128;  // tokens of a frame that one block sums

struct Token {
  int64_t batch, token, frame;
};

template <typename T>
__device__ __forceinline__ const T* row(const ConstFeatures& x, const Token& at) {
  return static_cast<const T*>(x.data) + at.batch * x.batch_stride + at.token * x.token_stride;
}

template <typename T>
__device__ __forceinline__ T* row(const MutableFeatures& x, const Token& at) {
  return static_cast<T*>(x.data) + at.batch * x.batch_stride + at.token * x.token_stride;
}

SELFFORCING_HOST_DEVICE int64_t num_tokens(const FeatureShape& shape) {
  return static_cast<int64_t>(shape.frames) * shape.frame_seqlen;
}

// Ranges of tokens into which a frame is split for sums.
SELFFORCING_HOST_DEVICE int64_t num_ranges(const FeatureShape& shape) {
  return (static_cast<int64_t>(shape.frame_seqlen) + kRangeTokens - 1) / kRangeTokens;
}

// The index in [B, L] of this warp's token.
__device__ __forceinline__ int64_t warp_token() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / ptx::kWarpSize;
}

__device__ __forceinline__ Token token_at(const FeatureShape& shape, int64_t index) {
  const int64_t frame = index / shape.frame_seqlen, batch = frame / shape.frames;
  return {batch, index - batch * num_tokens(shape), frame - batch * shape.frames};
}

// Calls visit(c) for this lane's groups of kWidth channels.
template <int kWidth, typename Visit>
__device__ __forceinline__ void for_channels(int32_t channels, const Visit& visit) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x % ptx::kWarpSize);
  for (int32_t c = lane * kWidth; c < channels; c += ptx::kWarpSize * kWidth) visit(c);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) modulated_layer_norm_kernel(const ModulatedLayerNormParams params) {
  const int64_t index = warp_token();
  if (index >= params.shape.batch * num_tokens(params.shape)) return;
  const Token at = token_at(params.shape, index);
  const int32_t channels = params.shape.channels;
  const T* x = row<T>(params.x, at);
  T* y = row<T>(params.y, at);
  const float* shift = params.shift.row(at.batch, at.frame);
  const float* scale = params.scale.row(at.batch, at.frame);

  float sum = 0.0f;
  for_channels<kWidth>(channels, [&](int32_t c) {
    float values[kWidth];
    ptx::load_elements<T>(x + c, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += values[i];
  });
  // The row is in the first-level cache now. A second pass over it avoids the cancellation of E[x^2] - E[x]^2, and what
  // is left of the mean after subtracting it corrects its rounding.
  const float rough_mean = ptx::warp_sum(sum) / channels;
  float rest = 0.0f, squares = 0.0f;
  for_channels<kWidth>(channels, [&](int32_t c) {
    float values[kWidth];
    ptx::load_elements<T>(x + c, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float centered = values[i] - rough_mean;
      rest += centered;
      squares += centered * centered;
    }
  });
  const float correction = ptx::warp_sum(rest) / channels, mean = rough_mean + correction;
  const float variance = ptx::warp_sum(squares) / channels - correction * correction;
  const float rstd = 1.0f / sqrtf(fmaxf(variance, 0.0f) + params.eps);
  if (threadIdx.x % ptx::kWarpSize == 0) {
    params.mean[index] = mean;
    params.rstd[index] = rstd;
  }
  for_channels<kWidth>(channels, [&](int32_t c) {
    float values[kWidth], shifts[kWidth], scales[kWidth];
    ptx::load_elements<T>(x + c, values);
    ptx::load_elements<float>(shift + c, shifts);
    ptx::load_elements<float>(scale + c, scales);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = (values[i] - mean) * rstd * (1.0f + scales[i]) + shifts[i];
    ptx::store_elements<T>(y + c, values);
  });
}

// grad_x = rstd (g - mean(g) - normed mean(g normed)) with g = grad_y (1 + scale), normed = (x - mean) rstd.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) layer_norm_grad_x_kernel(const ModulatedLayerNormBackwardParams params) {
  const int64_t index = warp_token();
  if (index >= params.shape.batch * num_tokens(params.shape)) return;
  const Token at = token_at(params.shape, index);
  const int32_t channels = params.shape.channels;
  const T* grad_y = row<T>(params.grad_y, at);
  const T* x = row<T>(params.x, at);
  const float* scale = params.scale.row(at.batch, at.frame);
  const float mean = params.mean[index], rstd = params.rstd[index];

  const auto load = [&](int32_t c, float (&grads)[kWidth], float (&normed)[kWidth]) {
    float scales[kWidth];
    ptx::load_elements<T>(grad_y + c, grads);
    ptx::load_elements<T>(x + c, normed);
    ptx::load_elements<float>(scale + c, scales);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grads[i] *= 1.0f + scales[i];
      normed[i] = (normed[i] - mean) * rstd;
    }
  };
  float sum = 0.0f, dot = 0.0f;
  for_channels<kWidth>(channels, [&](int32_t c) {
    float grads[kWidth], normed[kWidth];
    load(c, grads, normed);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum += grads[i];
      dot += grads[i] * normed[i];
    }
  });
  const float mean_grad = ptx::warp_sum(sum) / channels, mean_dot = ptx::warp_sum(dot) / channels;
  T* grad_x = row<T>(params.grad_x, at);
  for_channels<kWidth>(channels, [&](int32_t c) {
    float grads[kWidth], normed[kWidth];
    load(c, grads, normed);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grads[i] = rstd * (grads[i] - mean_grad - normed[i] * mean_dot);
    ptx::store_elements<T>(grad_x + c, grads);
  });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) gated_residual_kernel(const GatedResidualParams params) {
  const int64_t index = warp_token();
  if (index >= params.shape.batch * num_tokens(params.shape)) return;
  const Token at = token_at(params.shape, index);
  const T* x = row<T>(params.x, at);
  const T* y = row<T>(params.y, at);
  T* out = row<T>(params.out, at);
  const float* gate = params.gate.row(at.batch, at.frame);
  for_channels<kWidth>(params.shape.channels, [&](int32_t c) {
    float values[kWidth], added[kWidth], gates[kWidth];
    ptx::load_elements<T>(x + c, values);
    ptx::load_elements<T>(y + c, added);
    ptx::load_elements<float>(gate + c, gates);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] += added[i] * gates[i];
    ptx::store_elements<T>(out + c, values);
  });
}

// ---- Sums over frames. Grid: x ranges of all frames of the batch, y column groups.

// Calls add(token, c, sums) for every token of this block's range, then writes the totals to their slots.
template <int kSums, int kWidth, typename Add>
__device__ __forceinline__ void sum_frame(const FeatureShape& shape, const ptx::RangeSums<kSums>& out, const Add& add) {
  const int32_t c = static_cast<int32_t>(blockIdx.y * ptx::kColumnLanes + threadIdx.x) * kWidth;
  const uint32_t ranges = static_cast<uint32_t>(num_ranges(shape)), frames = static_cast<uint32_t>(shape.frames);
  const uint32_t group = blockIdx.x / ranges, range = blockIdx.x - group * ranges;
  const int32_t first = static_cast<int32_t>(range) * kRangeTokens;
  const int64_t batch = group / frames, frame = group % frames;
  float sums[kSums][kWidth];
  ptx::sum_rows<kSums, kWidth>(first, min(first + kRangeTokens, shape.frame_seqlen), c < shape.channels, sums,
                               [&](int32_t within, float (&totals)[kSums][kWidth]) {
                                 add(Token{batch, frame * shape.frame_seqlen + within, frame}, c, totals);
                               });
  if (threadIdx.y != 0 || c >= shape.channels) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) ptx::store_elements<float>(out.slot(s, group, range) + c, sums[s]);
}

constexpr int kSumThreads = ptx::kColumnLanes * ptx::kRowLanes;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    layer_norm_grad_modulation_kernel(const ModulatedLayerNormBackwardParams params, const ptx::RangeSums<2> out) {
  sum_frame<2, kWidth>(params.shape, out, [&](const Token& at, int32_t c, float (&sums)[2][kWidth]) {
    float grads[kWidth], values[kWidth];
    ptx::load_elements<T>(row<T>(params.grad_y, at) + c, grads);
    ptx::load_elements<T>(row<T>(params.x, at) + c, values);
    const int64_t index = at.batch * num_tokens(params.shape) + at.token;
    const float mean = params.mean[index], rstd = params.rstd[index];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[0][i] += grads[i];
      sums[1][i] += grads[i] * (values[i] - mean) * rstd;
    }
  });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    gated_residual_backward_kernel(const GatedResidualBackwardParams params, const ptx::RangeSums<1> out) {
  sum_frame<1, kWidth>(params.shape, out, [&](const Token& at, int32_t c, float (&sums)[1][kWidth]) {
    float grads[kWidth], values[kWidth], gates[kWidth];
    ptx::load_elements<T>(row<T>(params.grad_out, at) + c, grads);
    ptx::load_elements<T>(row<T>(params.y, at) + c, values);
    ptx::load_elements<float>(params.gate.row(at.batch, at.frame) + c, gates);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[0][i] += grads[i] * values[i];
      grads[i] *= gates[i];
    }
    ptx::store_elements<T>(row<T>(params.grad_y, at) + c, grads);
  });
}

// ---- Launches

template <typename T, typename Pointer>
bool is_wide(const Features<Pointer>& x) {
  return ptx::wide_access<T>(x.data, x.batch_stride, x.token_stride);
}

template <typename T>
bool is_wide(const Modulation& x) {
  return ptx::wide_access<float>(x.data, x.batch_stride, x.frame_stride);
}

// Calls launch(element, width): the CUDA type, and the channels per access: 16 bytes where every tensor allows it,
// else 1.
template <typename Launch, typename... Tensors>
int32_t with_element_and_width(const FeatureShape& shape, const Launch& launch, const Tensors&... tensors) {
  return ptx::with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = ptx::kVector<T>;
    if (shape.channels % kWide == 0 && (is_wide<T>(tensors) && ...))
      return launch(element, std::integral_constant<int, kWide>{});
    return launch(element, std::integral_constant<int, 1>{});
  });
}

dim3 token_grid(const FeatureShape& shape) {
  return dim3(static_cast<unsigned>((shape.batch * num_tokens(shape) + kWarps - 1) / kWarps));
}

template <int kWidth>
dim3 sum_grid(const FeatureShape& shape) {
  constexpr int kColumns = ptx::kColumnLanes * kWidth;
  return dim3(static_cast<unsigned>(num_ranges(shape) * shape.batch * shape.frames),
              static_cast<unsigned>((shape.channels + kColumns - 1) / kColumns));
}

constexpr dim3 kSumBlock(ptx::kColumnLanes, ptx::kRowLanes);

template <int kSums>
ptx::RangeSums<kSums> range_sums(const FeatureShape& shape, float* workspace) {
  return {workspace, {}, static_cast<int64_t>(shape.batch) * shape.frames, num_ranges(shape), shape.channels};
}

}  // namespace

int32_t modulated_layer_norm_cuda(const ModulatedLayerNormParams& params) {
  return with_element_and_width(
      params.shape,
      [&](auto element, auto width) {
        return ptx::launch(modulated_layer_norm_kernel<decltype(element), decltype(width)::value>,
                           token_grid(params.shape), dim3(kThreads), 0, params.stream, params);
      },
      params.x, params.y, params.shift, params.scale);
}

int64_t modulated_layer_norm_backward_workspace_floats_cuda(const FeatureShape& shape) {
  return range_sums<2>(shape, nullptr).floats();
}

int32_t modulated_layer_norm_backward_cuda(const ModulatedLayerNormBackwardParams& params) {
  ptx::RangeSums<2> sums = range_sums<2>(params.shape, params.workspace);
  sums.out[0] = params.grad_shift;
  sums.out[1] = params.grad_scale;
  const int32_t error = with_element_and_width(
      params.shape,
      [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int kWidth = decltype(width)::value;
        const int32_t error = ptx::launch(layer_norm_grad_x_kernel<T, kWidth>, token_grid(params.shape), dim3(kThreads),
                                          0, params.stream, params);
        if (error != 0) return error;
        return ptx::launch(layer_norm_grad_modulation_kernel<T, kWidth>, sum_grid<kWidth>(params.shape), kSumBlock, 0,
                           params.stream, params, sums);
      },
      params.grad_y, params.x, params.grad_x, params.scale);
  return error != 0 ? error : ptx::launch_add_ranges(sums, params.stream);
}

int32_t gated_residual_cuda(const GatedResidualParams& params) {
  return with_element_and_width(
      params.shape,
      [&](auto element, auto width) {
        return ptx::launch(gated_residual_kernel<decltype(element), decltype(width)::value>, token_grid(params.shape),
                           dim3(kThreads), 0, params.stream, params);
      },
      params.x, params.y, params.out, params.gate);
}

int64_t gated_residual_backward_workspace_floats_cuda(const FeatureShape& shape) {
  return range_sums<1>(shape, nullptr).floats();
}

int32_t gated_residual_backward_cuda(const GatedResidualBackwardParams& params) {
  ptx::RangeSums<1> sums = range_sums<1>(params.shape, params.workspace);
  sums.out[0] = params.grad_gate;
  const int32_t error = with_element_and_width(
      params.shape,
      [&](auto element, auto width) {
        constexpr int kWidth = decltype(width)::value;
        return ptx::launch(gated_residual_backward_kernel<decltype(element), kWidth>, sum_grid<kWidth>(params.shape),
                           kSumBlock, 0, params.stream, params, sums);
      },
      params.grad_out, params.y, params.grad_y, params.gate);
  return error != 0 ? error : ptx::launch_add_ranges(sums, params.stream);
}

}  // namespace selfforcing
