// out = softmax(scale q k^T) v on tensor cores (FlashAttention-2, arXiv 2307.08691, algorithm 1). Keys and values have
// a tile each in shared memory: values arrive during the product with the keys, the next keys during that with the
// values.
//
// With fewer tiles of queries than multiprocessors, several thread blocks share a tile.
#pragma once
#include "cuda_mma_tiles.cuh"
#include "cuda_parts.cuh"
#include "cuda_schedule.cuh"

namespace selfforcing::attention_cuda {

template <typename T, int kHeadDim>
struct MmaForwardTile {
  static constexpr int kM = kHeadDim <= 128 ? 2 : 1;  // fragments of rows of a warp: what the registers hold
  static constexpr int kQueries = kMmaWarps * kM * kFragmentRows;
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : 32;
  using Queries = SharedTile<T, kQueries, kHeadDim>;
  using Keys = SharedTile<T, kKeys, kHeadDim>;
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = Queries::kBytes + 2 * kStages * Keys::kBytes;
  static_assert(kSharedBytes <= ptx::kMaxSharedBytes);
};

// The softmax of a warp's rows so far; `largest` and the exponents are in units of log2.
template <int kM>
struct RowSoftmax {
  float largest[kM][2], sum[kM][2];  // `sum` is over this lane's columns alone until the end

  __device__ __forceinline__ RowSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) largest[m][i] = -INFINITY, sum[m][i] = 0.0f;
  }
};

template <int kM, int kN>
__device__ __forceinline__ void negate(Fragments<kM, kN>& scores) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores.at[m][n][i] = -scores.at[m][n][i];
}

// Turns scores into probabilities relative to the largest so far and rescales what was summed relative to another.
// scale_log2 >= 0; all scores get the bias; columns from `count` on do not count.
template <int kM, int kN, int kD>
__device__ __forceinline__ void update_softmax(Fragments<kM, kN>& scores, int32_t count, float scale_log2,
                                               float bias_log2, RowSoftmax<kM>& softmax, Fragments<kM, kD>& out) {
  const bool full = count >= kN * kFragmentColumns;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (full || column_in_fragments(n, j) < count) largest = fmaxf(largest, scores.at[m][n][2 * i + j]);
      largest = fmaxf(softmax.largest[m][i], fmaf(quad_max(largest), scale_log2, bias_log2));
      const float reference = largest == -INFINITY ? 0.0f : largest;  // -inf minus -inf would be NaN
      const float correction = ptx::fast_exp2(softmax.largest[m][i] - reference);
      softmax.largest[m][i] = largest;
      float sum = softmax.sum[m][i] * correction;
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores.at[m][n][2 * i + j];
          x = ptx::fast_exp2(fmaf(x, scale_log2, bias_log2 - reference));
          if (!full && column_in_fragments(n, j) >= count) x = 0.0f;
          sum += x;
        }
      softmax.sum[m][i] = sum;
#pragma unroll
      for (int d = 0; d < kD; ++d) out.at[m][d][2 * i] *= correction, out.at[m][d][2 * i + 1] *= correction;
    }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMmaThreads, kOneBlock)
    mma_forward_kernel(const AttentionParams params, const KeySplit split) {
  using Tile = MmaForwardTile<T, kHeadDim>;
  constexpr int kM = Tile::kM;
  SELFFORCING_DYNAMIC_SHARED(shared);
  const typename Tile::Queries q_tile(shared);
  const auto key_tile = [&](int stage, bool values) {
    return typename Tile::Keys(shared + Tile::Queries::kBytes + (2 * stage + values) * Tile::Keys::kBytes);
  };

  // Later blocks see more keys: they start first, so that the grid does not end with the longest work.
  const RowTile queries =
      find_row_tile<Tile::kQueries>(params.spans, params.num_queries, static_cast<int32_t>(gridDim.x - 1 - blockIdx.x));
  if (queries.count <= 0) return;
  const int32_t part = static_cast<int32_t>(blockIdx.z) % split.parts;
  const int32_t stream = static_cast<int32_t>(blockIdx.z) / split.parts, head = static_cast<int32_t>(blockIdx.y);
  const int32_t kv_head = head / (params.num_heads / params.num_kv_heads);

  ColumnTiles<Tile::kKeys> key_tiles(params.spans, queries.block, params.num_keys);
  key_tiles.prepend(params.past, stream, kv_head);
  key_tiles.take_every(split.parts, part);
  q_tile.copy(head_rows<const T>(params.q, stream, head), queries.start, queries.count, params.head_dim);

  const auto source = [&](bool values) { return KeySource<T>{params, stream, kv_head, values}; };
  const float scale_log2 = fabsf(params.softmax_scale) * kLog2E;
  const int first_row = warp() * kM * kFragmentRows;
  RowSoftmax<kM> softmax;
  Fragments<kM, kHeadDim / kFragmentColumns> out;
  stream_tiles<Tile::kStages, ColumnTile>([&](ColumnTile& keys) { return key_tiles.next(keys); },
                                          [&](const ColumnTile& keys, int stage) {
                                            key_tile(stage, false).copy(source(false), keys, params.head_dim);
                                            key_tile(stage, true).copy(source(true), keys, params.head_dim);
                                          },
                                          [&](const ColumnTile& keys, int stage) {
                                            key_tile(stage, false).decode(source(false), keys, params.head_dim);
                                            key_tile(stage, true).decode(source(true), keys, params.head_dim);
                                          },
                                          [&](const ColumnTile& keys, int stage) {
                                            Fragments<kM, Tile::kKeys / kFragmentColumns> scores;
                                            multiply_transposed(scores, q_tile, first_row, key_tile(stage, false));
                                            if (params.softmax_scale < 0.0f) negate(scores);
                                            update_softmax(scores, keys.count, scale_log2,
                                                           source(false).bias_log2(keys), softmax, out);
                                            add_product(out, scores, key_tile(stage, true));
                                          });

  const int64_t row_of_lse = row_of_head(params, stream, head) + queries.start;
  float* const lse = split.parts == 1 ? params.lse : split.lse + part * split.rows;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(softmax.sum[m][i]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int d = 0; d < kHeadDim / kFragmentColumns; ++d)
        out.at[m][d][2 * i] *= inverse, out.at[m][d][2 * i + 1] *= inverse;
      const int row = first_row + m * kFragmentRows + row_in_fragment(i);
      if (row >= queries.count) continue;
      if (lane() % 4 == 0) lse[row_of_lse + row] = sum == 0.0f ? -INFINITY : softmax.largest[m][i] * kLn2 + logf(sum);
    }
  if (split.parts > 1)
    store_sums(out, 1.0f, split.out + (part * split.rows + row_of_lse) * params.head_dim, queries.count,
               params.head_dim);
  else
    store_rows(out, 1.0f, q_tile, head_rows<T>(params.out, stream, head), queries.start, queries.count,
               params.head_dim);
}

// Joins the parts of every query, one warp each.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) join_parts_kernel(const AttentionParams params, const KeySplit split) {
  const int32_t query = static_cast<int32_t>(blockIdx.x * kJoinRows + threadIdx.x / kWarpSize);
  if (query >= params.num_queries) return;
  const int32_t head = static_cast<int32_t>(blockIdx.y), stream = static_cast<int32_t>(blockIdx.z);
  const int64_t row = row_of_head(params, stream, head) + query;
  join_parts(split, row, params.head_dim, params.lse + row, head_rows<T>(params.out, stream, head).at(query));
}

template <typename T, int kHeadDim>
int64_t mma_forward_workspace_bytes(const AttentionParams& params) {
  using Tile = MmaForwardTile<T, kHeadDim>;
  return KeySplit::workspace_bytes(parts_of_keys(params, Tile::kQueries, Tile::kKeys), num_query_rows(params),
                                   params.head_dim);
}

template <typename T, int kHeadDim>
int32_t launch_mma_forward(const AttentionParams& params) {
  using Tile = MmaForwardTile<T, kHeadDim>;
  const KeySplit split(parts_of_keys(params, Tile::kQueries, Tile::kKeys), num_query_rows(params), params.head_dim,
                       params.workspace);
  const unsigned heads = static_cast<unsigned>(params.num_heads), batch = static_cast<unsigned>(params.batch);
  const dim3 grid(max_row_tiles(params.num_queries, params.spans, Tile::kQueries), heads,
                  batch * static_cast<unsigned>(split.parts));
  if (const int32_t error = ptx::launch(mma_forward_kernel<T, kHeadDim>, grid, dim3(kMmaThreads), Tile::kSharedBytes,
                                        params.stream, params, split))
    return error;
  if (split.parts == 1) return 0;
  const dim3 join_grid((static_cast<unsigned>(params.num_queries) + kJoinRows - 1) / kJoinRows, heads, batch);
  return ptx::launch(join_parts_kernel<T>, join_grid, dim3(kJoinThreads), 0, params.stream, params, split);
}

}  // namespace selfforcing::attention_cuda
