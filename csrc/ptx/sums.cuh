// Sums whose order depends on sizes alone, so that the same inputs give the same bits.
#pragma once
#include "launch.cuh"

namespace selfforcing::ptx {

// Sum over a block of kThreads threads, the same bits in every thread.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ float of_warp[kWarps];
  x = warp_sum(x);
  __syncthreads();  // the values of an earlier sum have been read
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp];
  return sum;
}

// Sums over the rows of a matrix: a block of kColumnLanes x kRowLanes threads covers kColumnLanes groups of kWidth
// columns and rows [first, end), thread y the rows first + y, first + y + kRowLanes, ...
constexpr int kColumnLanes = 32;
constexpr int kRowLanes = 8;

// add(row, sums) adds one row's columns of this thread; `active` says whether it has any. Afterwards the threads with
// threadIdx.y == 0 hold the totals.
template <int kSums, int kWidth, typename Add>
__device__ __forceinline__ void sum_rows(int32_t first, int32_t end, bool active, float (&sums)[kSums][kWidth],
                                         const Add& add) {
  __shared__ float partial[kSums][kRowLanes][kWidth][kColumnLanes];
#pragma unroll
  for (int s = 0; s < kSums; ++s)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[s][i] = 0.0f;
  if (active)
    for (int32_t row = first + static_cast<int32_t>(threadIdx.y); row < end; row += kRowLanes) add(row, sums);
#pragma unroll
  for (int s = 0; s < kSums; ++s)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[s][threadIdx.y][i][threadIdx.x] = sums[s][i];
  __syncthreads();
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s)
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
#pragma unroll
      for (int y = 1; y < kRowLanes; ++y) sums[s][i] += partial[s][y][i][threadIdx.x];
}

// Adds the ranges into which sum_rows was split: partial [kSums, groups, ranges, columns] -> out[s] [groups, columns].
template <int kSums>
struct RangeSums {
  const float* partial;
  float* out[kSums];
  int64_t groups, ranges, columns;

  // Where one range of a group goes.
  __device__ __forceinline__ float* slot(int sum, int64_t group, int64_t range) const {
    return const_cast<float*>(partial) + ((sum * groups + group) * ranges + range) * columns;
  }
  int64_t floats() const { return kSums * groups * ranges * columns; }
};

constexpr int kRangeThreads = 128;

template <int kSums>
__global__ void __launch_bounds__(kRangeThreads) add_ranges_kernel(const RangeSums<kSums> sums) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kRangeThreads + threadIdx.x;
  if (index >= sums.groups * sums.columns) return;
  const int64_t group = index / sums.columns, column = index % sums.columns;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    double total = 0.0;
    for (int64_t range = 0; range < sums.ranges; ++range) total += sums.slot(s, group, range)[column];
    sums.out[s][index] = static_cast<float>(total);
  }
}

template <int kSums>
int32_t launch_add_ranges(const RangeSums<kSums>& sums, void* stream) {
  const int64_t blocks = (sums.groups * sums.columns + kRangeThreads - 1) / kRangeThreads;
  return launch(add_ranges_kernel<kSums>, dim3(static_cast<unsigned>(blocks)), dim3(kRangeThreads), 0, stream, sums);
}

}  // namespace selfforcing::ptx
