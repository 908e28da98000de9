// A token's channels in one warp: normalised over all heads and rotated.
#pragma once
#include <type_traits>

#include "../ptx/elements.cuh"
#include "cuda_turns.cuh"

namespace selfforcing {

constexpr int kTokenWarps = 4;  // of a block
constexpr int kTokenThreads = kTokenWarps * ptx::kWarpSize;

inline dim3 token_grid(int64_t tokens) { return dim3(static_cast<unsigned>((tokens + kTokenWarps - 1) / kTokenWarps)); }

// The index of this warp's token in all of them.
__device__ __forceinline__ int64_t warp_token() {
  return static_cast<int64_t>(blockIdx.x) * kTokenWarps + threadIdx.x / ptx::kWarpSize;
}

// The turns of this warp's token. All lanes of the warp come along.
__device__ __forceinline__ const WarpTurns& warp_turns(const RopeParams& params, int64_t stream, int64_t token) {
  __shared__ WarpTurns turns[kTokenWarps];
  WarpTurns& own = turns[threadIdx.x / ptx::kWarpSize];
  own.fill(params, stream, token);
  return own;
}

template <typename T, typename Pointer>
__device__ __forceinline__ auto token_row(const Heads<Pointer>& x, int64_t batch, int64_t token) {
  const int64_t offset = batch * x.batch_stride + token * x.token_stride;
  if constexpr (std::is_const_v<std::remove_pointer_t<Pointer>>) {
    return static_cast<const T*>(x.data) + offset;
  } else {
    return static_cast<T*>(x.data) + offset;
  }
}

// Calls visit(c, head, d) for this lane's groups of kWidth channels: channel c of the token is channel d of the head.
template <int kWidth, typename Visit>
__device__ __forceinline__ void for_channels(int32_t num_heads, int32_t head_dim, const Visit& visit) {
  constexpr int32_t kStep = ptx::kWarpSize * kWidth;
  const int32_t channels = num_heads * head_dim, head_step = kStep / head_dim, d_step = kStep - head_step * head_dim;
  int32_t c = static_cast<int32_t>(threadIdx.x % ptx::kWarpSize) * kWidth;
  int32_t head = c / head_dim, d = c - head * head_dim;
  for (; c < channels; c += kStep) {
    visit(c, head, d);
    head += head_step, d += d_step;
    if (d >= head_dim) ++head, d -= head_dim;
  }
}

// Calls write(head, d, values) for this lane's channels of y. Returns the token's rstd.
template <typename T, int kWidth, typename Write>
__device__ __forceinline__ float norm_rope_token(const QkNormRopeParams& params, int64_t batch, int64_t token,
                                                 const Write& write) {
  const T* x = token_row<T>(params.x, batch, token);
  float squares = 0.0f;
  for_channels<kWidth>(params.num_heads, params.head_dim, [&](int32_t c, int32_t, int32_t) {
    float values[kWidth];
    ptx::load_elements<T>(x + c, values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += values[i] * values[i];
  });
  const float mean = ptx::warp_sum(squares) / static_cast<float>(params.num_heads * params.head_dim);
  const float rstd = 1.0f / sqrtf(mean + params.eps);
  const WarpTurns& turns = warp_turns(params, batch, token);
  for_channels<kWidth>(params.num_heads, params.head_dim, [&](int32_t c, int32_t head, int32_t d) {
    float values[kWidth], weights[kWidth];
    ptx::load_elements<T>(x + c, values);  // from the first-level cache
    ptx::load_elements<float>(params.weight + c, weights);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] *= rstd * weights[i];
    turns.turns<kWidth>(d).rotate(values);
    write(head, d, values);
  });
  return rstd;
}

}  // namespace selfforcing
