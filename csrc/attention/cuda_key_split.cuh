// Several thread blocks share a tile of queries: each takes every n-th tile of keys, and a second kernel joins their
// results by lse.
#pragma once
#include "cuda_rows.cuh"

namespace selfforcing::attention_cuda {

// Where the thread blocks leave their parts: normalised as if they were all.
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

constexpr int kJoinThreads = 128, kJoinRows = kJoinThreads / kWarpSize;  // of a thread block

}  // namespace selfforcing::attention_cuda
