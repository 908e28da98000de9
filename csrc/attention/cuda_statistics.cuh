// What backward needs of every query besides its rows: lse, and delta, which a kernel of its own computes first.
#pragma once
#include "cuda_rows.cuh"

namespace selfforcing::attention_cuda {

struct RowStatistics {
  float lse, lse_log2;  // +inf where there is nothing to see: every probability becomes 0
  float delta;
};

__device__ __forceinline__ RowStatistics read_statistics(const AttentionBackwardParams& params, int64_t first_row,
                                                         int32_t row, bool exists) {
  if (!exists) return {INFINITY, INFINITY, 0.0f};
  float lse = params.lse[first_row + row];
  if (lse == -INFINITY) lse = INFINITY;
  return {lse, lse * kLog2E, params.delta[first_row + row]};
}

constexpr int kDeltaThreads = 128;

// delta = rowsum(out * grad_out) - grad_lse, one warp per query.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads) attention_delta_kernel(const AttentionBackwardParams params) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t query = static_cast<int32_t>(blockIdx.x * (kDeltaThreads / kWarpSize) + threadIdx.x / kWarpSize);
  if (query >= params.num_queries) return;
  const Place place = place_of_query_head(params);
  const Rows<const T> out = head_rows<const T>(params.out, place.stream, place.head);
  const Rows<const T> grad_out = head_rows<const T>(params.grad_out, place.stream, place.head);
  float sum = 0.0f;
  for (int column = lane * kVector<T>; column < params.head_dim; column += kWarpSize * kVector<T>) {
    float left[kVector<T>], right[kVector<T>];
    ptx::unpack<T>(ptx::load_vector(out.at(query) + column, out.aligned), left);
    ptx::unpack<T>(ptx::load_vector(grad_out.at(query) + column, grad_out.aligned), right);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum = fmaf(left[i], right[i], sum);
  }
  sum = ptx::warp_sum(sum);
  const int64_t row = row_of_head(params, place.stream, place.head) + query;
  if (lane == 0) params.delta[row] = sum - (params.grad_lse == nullptr ? 0.0f : params.grad_lse[row]);
}

template <typename T>
int32_t launch_delta(const AttentionBackwardParams& params) {
  constexpr int kQueriesPerBlock = kDeltaThreads / kWarpSize;
  const dim3 grid(static_cast<unsigned>((params.num_queries + kQueriesPerBlock - 1) / kQueriesPerBlock),
                  static_cast<unsigned>(params.num_heads), static_cast<unsigned>(params.batch));
  return ptx::launch(attention_delta_kernel<T>, grid, dim3(kDeltaThreads), 0, params.stream, params);
}

}  // namespace selfforcing::attention_cuda
