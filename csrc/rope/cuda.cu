// Rotary embedding kernels: one pass over memory.
#include "../ptx/elements.cuh"
#include "../ptx/sums.cuh"
#include "cuda_tokens.cuh"

namespace selfforcing {
namespace {

// ---- rope_3d: a thread takes kWidth channels of a token in kHeadsPerThread heads, which share their angles and are
// loaded before the first is stored. Block: x the channels of a head, y tokens. Grid: x tokens, y groups of heads, z
// the batch.
constexpr int kRopeThreads = 256;  // at most
constexpr int32_t kHeadsPerThread = 4;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kRopeThreads) rope_3d_kernel(const RopeParams params) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, batch = blockIdx.z;
  if (token >= params.axes.num_tokens()) return;
  const int32_t d = static_cast<int32_t>(threadIdx.x) * kWidth;
  const int32_t first = static_cast<int32_t>(blockIdx.y) * kHeadsPerThread;
  const T* x = token_row<T>(params.x, batch, token) + d;
  T* y = token_row<T>(params.y, batch, token) + d;
  float values[kHeadsPerThread][kWidth];
#pragma unroll
  for (int32_t h = 0; h < kHeadsPerThread; ++h)
    if (first + h < params.num_heads) ptx::load_elements<T>(x + (first + h) * params.x.head_stride, values[h]);
  const Turns<kWidth> turns = TokenPosition(params, batch, token).template turns<kWidth>(d);
#pragma unroll
  for (int32_t h = 0; h < kHeadsPerThread; ++h) {
    if (first + h >= params.num_heads) return;
    turns.rotate(values[h]);
    ptx::store_elements<T>(y + (first + h) * params.y.head_stride, values[h]);
  }
}

// ---- qk_norm_rope

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads) qk_norm_rope_kernel(const QkNormRopeParams params) {
  const int64_t index = warp_token(), tokens = params.axes.num_tokens();
  if (index >= params.batch * tokens) return;
  const int64_t batch = index / tokens, token = index - batch * tokens;
  T* y = token_row<T>(params.y, batch, token);
  const float rstd =
      norm_rope_token<T, kWidth>(params, batch, token, [&](int32_t head, int32_t d, const float (&values)[kWidth]) {
        ptx::store_elements<T>(y + head * params.y.head_stride + d, values);
      });
  if (threadIdx.x % ptx::kWarpSize == 0) params.rstd[index] = rstd;
}

// grad_x = rstd (g - normed mean(g normed)) with g = weight times grad_y rotated back, normed = x rstd.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kTokenThreads) qk_norm_rope_grad_x_kernel(const QkNormRopeBackwardParams params) {
  const int64_t index = warp_token(), tokens = params.axes.num_tokens();
  if (index >= params.batch * tokens) return;
  const int64_t batch = index / tokens, token = index - batch * tokens;
  const int32_t channels = params.num_heads * params.head_dim;
  const T* grad_y = token_row<T>(params.x, batch, token);
  const T* x = token_row<T>(params.features, batch, token);
  const float rstd = params.rstd[index];
  const WarpTurns& turns = warp_turns(params, batch, token);
  const auto load = [&](int32_t c, int32_t head, int32_t d, float (&grads)[kWidth], float (&normed)[kWidth]) {
    float weights[kWidth];
    ptx::load_elements<T>(grad_y + head * params.x.head_stride + d, grads);
    ptx::load_elements<T>(x + c, normed);
    ptx::load_elements<float>(params.weight + c, weights);
    turns.turns<kWidth>(d).rotate(grads);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grads[i] *= weights[i];
      normed[i] *= rstd;
    }
  };
  float dot = 0.0f;
  for_channels<kWidth>(params.num_heads, params.head_dim, [&](int32_t c, int32_t head, int32_t d) {
    float grads[kWidth], normed[kWidth];
    load(c, head, d, grads, normed);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dot += grads[i] * normed[i];
  });
  const float mean_dot = ptx::warp_sum(dot) / static_cast<float>(channels);
  T* grad_x = static_cast<T*>(params.grad_x) + index * channels;
  for_channels<kWidth>(params.num_heads, params.head_dim, [&](int32_t c, int32_t head, int32_t d) {
    float grads[kWidth], normed[kWidth];
    load(c, head, d, grads, normed);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grads[i] = rstd * (grads[i] - normed[i] * mean_dot);
    ptx::store_elements<T>(grad_x + c, grads);
  });
}

// ---- The gradient of the weight sums over all tokens. Grid: x ranges of tokens, y groups of channels.
constexpr int kSumThreads = ptx::kColumnLanes * ptx::kRowLanes;
constexpr int64_t kRangeTokens = 128;  // of [B, L]

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    qk_norm_rope_grad_weight_kernel(const QkNormRopeBackwardParams params, const ptx::RangeSums<1> out) {
  const int32_t channels = params.num_heads * params.head_dim;
  const int32_t c = static_cast<int32_t>(blockIdx.y * ptx::kColumnLanes + threadIdx.x) * kWidth;
  const int32_t head = c / params.head_dim, d = c - head * params.head_dim;
  const int64_t tokens = params.axes.num_tokens(), first = blockIdx.x * kRangeTokens;
  const int64_t rest = params.batch * tokens - first;
  float sums[1][kWidth];
  ptx::sum_rows<1, kWidth>(0, static_cast<int32_t>(rest < kRangeTokens ? rest : kRangeTokens), c < channels, sums,
                           [&](int32_t within, float (&totals)[1][kWidth]) {
                             const int64_t index = first + within, batch = index / tokens;
                             const int64_t token = index - batch * tokens;
                             float grads[kWidth], values[kWidth];
                             ptx::load_elements<T>(
                                 token_row<T>(params.x, batch, token) + head * params.x.head_stride + d, grads);
                             ptx::load_elements<T>(token_row<T>(params.features, batch, token) + c, values);
                             TokenPosition(params, batch, token).turns<kWidth>(d).rotate(grads);
                             const float rstd = params.rstd[index];
#pragma unroll
                             for (int i = 0; i < kWidth; ++i) totals[0][i] += grads[i] * values[i] * rstd;
                           });
  if (threadIdx.y == 0 && c < channels) ptx::store_elements<float>(out.slot(0, 0, blockIdx.x) + c, sums[0]);
}

// ---- Launches

template <typename T, typename Pointer>
bool is_wide(const Heads<Pointer>& x) {
  return ptx::wide_access<T>(x.data, x.batch_stride, x.token_stride, x.head_stride);
}

// Calls launch(element, width): the CUDA type, and the channels per access: 16 bytes where every tensor allows it, else
// a pair.
template <typename Launch, typename... Tensors>
int32_t with_element_and_width(const RopeParams& params, const Launch& launch, const Tensors&... tensors) {
  return ptx::with_element(params.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = ptx::kVector<T>;
    if (params.head_dim % kWide == 0 && (is_wide<T>(tensors) && ...))
      return launch(element, std::integral_constant<int, kWide>{});
    return launch(element, std::integral_constant<int, 2>{});
  });
}

unsigned num_blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

ptx::RangeSums<1> range_sums(const QkNormRopeBackwardParams& params) {
  const int64_t ranges = num_blocks(params.batch * params.axes.num_tokens(), kRangeTokens);
  return {params.workspace, {params.grad_weight}, 1, ranges, static_cast<int64_t>(params.num_heads) * params.head_dim};
}

}  // namespace

int32_t rope_3d_cuda(const RopeParams& params) {
  return with_element_and_width(
      params,
      [&](auto element, auto width) {
        constexpr int kWidth = decltype(width)::value;
        const unsigned lanes = static_cast<unsigned>(params.head_dim / kWidth);
        const dim3 block(lanes, kRopeThreads / lanes);
        const dim3 grid(num_blocks(params.axes.num_tokens(), block.y), num_blocks(params.num_heads, kHeadsPerThread),
                        static_cast<unsigned>(params.batch));
        return ptx::launch(rope_3d_kernel<decltype(element), kWidth>, grid, block, 0, params.stream, params);
      },
      params.x, params.y);
}

int32_t qk_norm_rope_cuda(const QkNormRopeParams& params) {
  const ConstHeads weight{params.weight, 0, 0, 0};
  return with_element_and_width(
      params,
      [&](auto element, auto width) {
        return ptx::launch(qk_norm_rope_kernel<decltype(element), decltype(width)::value>,
                           token_grid(params.batch * params.axes.num_tokens()), dim3(kTokenThreads), 0, params.stream,
                           params);
      },
      params.x, params.y, weight);
}

int64_t qk_norm_rope_backward_workspace_floats_cuda(const QkNormRopeBackwardParams& params) {
  return range_sums(params).floats();
}

int32_t qk_norm_rope_backward_cuda(const QkNormRopeBackwardParams& params) {
  const ptx::RangeSums<1> sums = range_sums(params);
  const ConstHeads weight{params.weight, 0, 0, 0};
  const int32_t error = with_element_and_width(
      params,
      [&](auto element, auto width) {
        using T = decltype(element);
        constexpr int kWidth = decltype(width)::value;
        const int32_t error =
            ptx::launch(qk_norm_rope_grad_x_kernel<T, kWidth>, token_grid(params.batch * params.axes.num_tokens()),
                        dim3(kTokenThreads), 0, params.stream, params);
        if (error != 0) return error;
        const dim3 grid(static_cast<unsigned>(sums.ranges), num_blocks(sums.columns, ptx::kColumnLanes * kWidth));
        return ptx::launch(qk_norm_rope_grad_weight_kernel<T, kWidth>, grid, dim3(ptx::kColumnLanes, ptx::kRowLanes), 0,
                           params.stream, params, sums);
      },
      params.x, params.features, weight);
  return error != 0 ? error : ptx::launch_add_ranges(sums, params.stream);
}

}  // namespace selfforcing
