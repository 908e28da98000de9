// out = softmax(scale q k^T) v over the visible keys, tile by tile with a running maximum and sum (online softmax:
// Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
#pragma once
#include "cuda_float32_tiles.cuh"

namespace selfforcing::attention_cuda {

template <int kHeadDim>
struct Float32ForwardTile {
  static constexpr int kQueries = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kKeys = kQueries;
  static constexpr int kSharedBytes = sizeof(float) * (tile_floats(kQueries, kHeadDim) +  // q
                                                       tile_floats(kKeys, kHeadDim) +     // k, then v
                                                       tile_floats(kQueries, kKeys));     // probabilities
  static_assert(kSharedBytes <= ptx::kMaxSharedBytes);
};

// The softmax of a row so far, in units of log2: exp2 is the instruction that the hardware has.
template <int kRows>
struct RunningSoftmax {
  float maximum[kRows], sum[kRows];  // `sum` is over this thread's columns alone until the end

  __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) maximum[i] = -INFINITY, sum[i] = 0.0f;
  }
};

// Turns scores, to all of which the bias is added, into probabilities relative to the running maximum and rescales what
// was summed under the old one.
template <int kQueries, int kKeys, int kHeadDim>
__device__ __forceinline__ void update_softmax(Scores<kQueries, kKeys>& scores, int32_t num_keys, float scale_log2,
                                               float bias_log2, RunningSoftmax<kQueries / kRowThreads>& softmax,
                                               Accumulator<kQueries, kHeadDim>& out) {
  using Tile = Scores<kQueries, kKeys>;
#pragma unroll
  for (int i = 0; i < Tile::kM; ++i) {
    float maximum = softmax.maximum[i];
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      const bool visible = thread_x() + j * kRowThreads < num_keys;
      scores.at[i][j] = visible ? fmaf(scores.at[i][j], scale_log2, bias_log2) : -INFINITY;
      maximum = fmaxf(maximum, scores.at[i][j]);
    }
    maximum = row_max(maximum);
    const float reference = maximum == -INFINITY ? 0.0f : maximum;  // -inf minus -inf would be NaN
    const float correction = exp2f(softmax.maximum[i] - reference);
    softmax.maximum[i] = maximum;
    softmax.sum[i] *= correction;
    out.scale(i, correction);
#pragma unroll
    for (int j = 0; j < Tile::kN; ++j) {
      scores.at[i][j] = exp2f(scores.at[i][j] - reference);
      softmax.sum[i] += scores.at[i][j];
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, kOneBlock) float32_forward_kernel(const AttentionParams params) {
  using Tile = Float32ForwardTile<kHeadDim>;
  SELFFORCING_DYNAMIC_SHARED(shared);
  float* const q_tile = reinterpret_cast<float*>(shared);
  float* const kv_tile = q_tile + tile_floats(Tile::kQueries, kHeadDim);
  float* const probabilities = kv_tile + tile_floats(Tile::kKeys, kHeadDim);

  // Later blocks see more keys: they start first, so that the grid does not end with the longest work.
  const int32_t tile = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);
  const RowTile queries = find_row_tile<Tile::kQueries>(params.spans, params.num_queries, tile);
  if (queries.count <= 0) return;
  const Place place = place_of_query_head(params);

  Fetch<Tile::kQueries, kHeadDim> q_fetch;
  q_fetch.load(head_rows<const float>(params.q, place.stream, place.head), queries.start, queries.count,
               params.head_dim);
  q_fetch.store(q_tile);

  const KeySource<float> k_source{params, place.stream, place.kv_head, false};
  const KeySource<float> v_source{params, place.stream, place.kv_head, true};
  const float scale_log2 = params.softmax_scale * kLog2E;
  RunningSoftmax<Tile::kQueries / kRowThreads> softmax;
  Accumulator<Tile::kQueries, kHeadDim> out;
  ColumnTiles<Tile::kKeys> key_tiles(params.spans, queries.block, params.num_keys);
  key_tiles.prepend(params.past, place.stream, place.kv_head);
  for (ColumnTile keys; key_tiles.next(keys);) {
    Fetch<Tile::kKeys, kHeadDim> fetch;
    fetch.load(k_source, keys, params.head_dim);
    __syncthreads();  // the values of the tile before are used up
    fetch.store(kv_tile, k_source, keys, params.head_dim);
    __syncthreads();
    fetch.load(v_source, keys, params.head_dim);
    Scores<Tile::kQueries, Tile::kKeys> scores;
    multiply<kHeadDim>(scores, q_tile, kv_tile, params.head_dim);
    update_softmax(scores, keys.count, scale_log2, k_source.bias_log2(keys), softmax, out);
    share(scores, probabilities);
    __syncthreads();  // the keys are used up
    fetch.store(kv_tile, v_source, keys, params.head_dim);
    __syncthreads();
    out.template add<Tile::kKeys>(probabilities, kv_tile, keys.count);
  }

  float* const lse = params.lse + row_of_head(params, place.stream, place.head) + queries.start;
#pragma unroll
  for (int i = 0; i < Tile::kQueries / kRowThreads; ++i) {
    const int row = thread_y() + i * kRowThreads;
    const float sum = row_sum(softmax.sum[i]);
    out.scale(i, sum == 0.0f ? 0.0f : 1.0f / sum);
    if (thread_x() == 0 && row < queries.count)
      lse[row] = sum == 0.0f ? -INFINITY : softmax.maximum[i] * kLn2 + logf(sum);
  }
  out.store(head_rows<float>(params.out, place.stream, place.head), queries.start, queries.count, params.head_dim);
}

template <int kHeadDim>
int32_t launch_float32_forward(const AttentionParams& params) {
  using Tile = Float32ForwardTile<kHeadDim>;
  const dim3 grid(max_row_tiles(params.num_queries, params.spans, Tile::kQueries),
                  static_cast<unsigned>(params.num_heads), static_cast<unsigned>(params.batch));
  return ptx::launch(float32_forward_kernel<kHeadDim>, grid, dim3(kThreads), Tile::kSharedBytes, params.stream, params);
}

}  // namespace selfforcing::attention_cuda
