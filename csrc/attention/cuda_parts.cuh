// What thread blocks leave in the workspace of rows that they share, and how a second kernel joins it: always in the
// order of the parts.
#pragma once
#include "cuda_rows.cuh"

namespace selfforcing::attention_cuda {

constexpr int kJoinThreads = 128, kJoinRows = kJoinThreads / kWarpSize;  // of a thread block: a warp for each row

// Forward: results over some keys, normalised as if they were all.
struct KeySplit {
  int32_t parts = 1;
  int64_t rows = 0;      // of queries that are shared
  float* out = nullptr;  // [parts, rows, D]
  float* lse = nullptr;  // [parts, rows]

  static int64_t workspace_bytes(int64_t parts, int64_t rows, int32_t head_dim) {
    return parts == 1 ? 0 : parts * rows * (head_dim + 1) * static_cast<int64_t>(sizeof(float));
  }
  KeySplit(int32_t parts, int64_t rows, int32_t head_dim, void* workspace) : parts(parts), rows(rows) {
    if (parts == 1) return;
    out = static_cast<float*>(workspace);
    lse = out + parts * rows * head_dim;
  }
};

// Joins the parts of one row, by a warp: out = sum of exp(lse of the part - lse) out of the part.
template <typename T>
__device__ __forceinline__ void join_parts(const KeySplit& split, int64_t row, int32_t head_dim, float* lse, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float largest = -INFINITY, sum = 0.0f;
  for (int32_t part = 0; part < split.parts; ++part) largest = fmaxf(largest, split.lse[part * split.rows + row]);
  const bool sees = largest != -INFINITY;
  for (int32_t part = 0; sees && part < split.parts; ++part) sum += expf(split.lse[part * split.rows + row] - largest);
  const float joined = sees ? largest + logf(sum) : -INFINITY;
  if (lane == 0) *lse = joined;
  for (int column = lane; column < head_dim; column += kWarpSize) {
    float total = 0.0f;
    for (int32_t part = 0; sees && part < split.parts; ++part) {
      const int64_t row_of_part = part * split.rows + row;
      total += expf(split.lse[row_of_part] - joined) * split.out[row_of_part * head_dim + column];
    }
    out[column] = ptx::from_float<T>(total);
  }
}

// Backward: gradients of some rows, sums over a part of the columns each.
struct GradientParts {
  int32_t parts = 1, head_dim = 0;
  int64_t rows = 0;       // that are shared
  float* sums = nullptr;  // [parts, rows, D]

  int64_t size() const { return parts == 1 ? 0 : parts * rows * head_dim; }
  int64_t bytes() const { return size() * static_cast<int64_t>(sizeof(float)); }

  // Row of a part: part * rows + row.
  __device__ __forceinline__ float* at(int64_t row_of_part) const { return sums + row_of_part * head_dim; }

  // Calls write(channel, grads) for the channels of a row, two at a time, by a warp.
  template <typename Write>
  __device__ __forceinline__ void add_up(int64_t row, const Write& write) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int channel = 2 * lane; channel < head_dim; channel += 2 * kWarpSize) {
      float grads[2] = {0.0f, 0.0f};
      for (int32_t part = 0; part < parts; ++part) {
        const float2 more = *reinterpret_cast<const float2*>(at(part * rows + row) + channel);
        grads[0] += more.x, grads[1] += more.y;
      }
      write(channel, grads);
    }
  }
  // The same, into a row of a tensor.
  template <typename T>
  __device__ __forceinline__ void join(int64_t row, T* to) const {
    add_up(row, [&](int channel, const float (&grads)[2]) {
      to[channel] = ptx::from_float<T>(grads[0]);
      to[channel + 1] = ptx::from_float<T>(grads[1]);
    });
  }
};

}  // namespace selfforcing::attention_cuda
