// Gradients of attention in three passes without atomics, so that the same inputs give the same bits: delta per query;
// grad_q by query tiles over their spans; grad_k and grad_v by key tiles over the spans of queries that see them
// (FlashAttention-2, arXiv 2307.08691, section 3.1.2, with the loops apart). Probabilities are computed anew from lse,
// in natural units: log2(e) times lse would be rounded once more, which alone costs as much as the scores.
#pragma once
#include "cuda_float32_tiles.cuh"
#include "cuda_statistics.cuh"

namespace selfforcing::attention_cuda {

template <int kHeadDim>
struct Float32GradQTile {
  static constexpr int kQueries = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : (kHeadDim <= 128 ? 32 : 16);
  static constexpr int kSharedBytes = sizeof(float) * (2 * tile_floats(kQueries, kHeadDim) +  // q, grad_out
                                                       tile_floats(kKeys, kHeadDim) +         // v, then k
                                                       tile_floats(kQueries, kKeys));         // grad of scores
  static_assert(kSharedBytes <= ptx::kMaxSharedBytes);
};

template <int kHeadDim>
struct Float32GradKVTile {
  static constexpr int kKeys = kHeadDim <= 64 ? 64 : (kHeadDim <= 128 ? 32 : 16);
  static constexpr int kQueries = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kSharedBytes = sizeof(float) * (2 * tile_floats(kKeys, kHeadDim) +     // k, v
                                                       2 * tile_floats(kQueries, kHeadDim) +  // q, grad_out
                                                       tile_floats(kKeys, kQueries));  // probabilities, then their grad
  static_assert(kSharedBytes <= ptx::kMaxSharedBytes);
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, kOneBlock) float32_grad_q_kernel(const AttentionBackwardParams params) {
  using Tile = Float32GradQTile<kHeadDim>;
  constexpr int kM = Tile::kQueries / kRowThreads, kN = Tile::kKeys / kRowThreads;
  SELFFORCING_DYNAMIC_SHARED(shared);
  float* const q_tile = reinterpret_cast<float*>(shared);
  float* const grad_out_tile = q_tile + tile_floats(Tile::kQueries, kHeadDim);
  float* const kv_tile = grad_out_tile + tile_floats(Tile::kQueries, kHeadDim);
  float* const grad_scores = kv_tile + tile_floats(Tile::kKeys, kHeadDim);

  const int32_t tile = static_cast<int32_t>(gridDim.x - 1 - blockIdx.x);  // longest work first
  const RowTile queries = find_row_tile<Tile::kQueries>(params.spans, params.num_queries, tile);
  if (queries.count <= 0) return;
  const Place place = place_of_query_head(params);

  {
    Fetch<Tile::kQueries, kHeadDim> fetch;
    fetch.load(head_rows<const float>(params.q, place.stream, place.head), queries.start, queries.count,
               params.head_dim);
    fetch.store(q_tile);
    fetch.load(head_rows<const float>(params.grad_out, place.stream, place.head), queries.start, queries.count,
               params.head_dim);
    fetch.store(grad_out_tile);
  }
  const int64_t first_row = row_of_head(params, place.stream, place.head) + queries.start;
  RowStatistics statistics[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    const int row = thread_y() + i * kRowThreads;
    statistics[i] = read_statistics(params, first_row, row, row < queries.count);
  }

  const KeySource<float> k_source{params, place.stream, place.kv_head, false};
  const KeySource<float> v_source{params, place.stream, place.kv_head, true};
  Accumulator<Tile::kQueries, kHeadDim> grad_q;
  ColumnTiles<Tile::kKeys> key_tiles(params.spans, queries.block, params.num_keys);
  key_tiles.prepend(params.past, place.stream, place.kv_head);
  for (ColumnTile keys; key_tiles.next(keys);) {
    Fetch<Tile::kKeys, kHeadDim> fetch;
    fetch.load(v_source, keys, params.head_dim);
    __syncthreads();  // the keys of the tile before are used up
    fetch.store(kv_tile, v_source, keys, params.head_dim);
    __syncthreads();
    fetch.load(k_source, keys, params.head_dim);
    Scores<Tile::kQueries, Tile::kKeys> grad, scores;
    multiply<kHeadDim>(grad, grad_out_tile, kv_tile, params.head_dim);  // of the probabilities
    __syncthreads();                                                    // the values are used up
    fetch.store(kv_tile, k_source, keys, params.head_dim);
    __syncthreads();
    multiply<kHeadDim>(scores, q_tile, kv_tile, params.head_dim);
    const float bias = k_source.bias(keys);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const bool visible = thread_x() + j * kRowThreads < keys.count;
        const float score = fmaf(scores.at[i][j], params.softmax_scale, bias - statistics[i].lse);
        const float probability = visible ? expf(score) : 0.0f;
        grad.at[i][j] = probability * (grad.at[i][j] - statistics[i].delta);
      }
    share(grad, grad_scores);
    grad_q.template add<Tile::kKeys>(grad_scores, kv_tile, keys.count);
  }

#pragma unroll
  for (int i = 0; i < kM; ++i) grad_q.scale(i, params.softmax_scale);
  grad_q.store(head_rows<float>(params.grad_q, place.stream, place.head), queries.start, queries.count,
               params.head_dim);
}

// Rows are keys and columns queries here. A K/V head gathers from all query heads that read it, one after the other.
// The first `past_tiles` thread blocks in x take tiles of the past, which every query of the call sees.
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, kTwoBlocks)
    float32_grad_kv_kernel(const AttentionBackwardParams params, unsigned past_tiles) {
  using Tile = Float32GradKVTile<kHeadDim>;
  constexpr int kM = Tile::kKeys / kRowThreads, kN = Tile::kQueries / kRowThreads;
  SELFFORCING_DYNAMIC_SHARED(shared);
  float* const k_tile = reinterpret_cast<float*>(shared);
  float* const v_tile = k_tile + tile_floats(Tile::kKeys, kHeadDim);
  float* const q_tile = v_tile + tile_floats(Tile::kKeys, kHeadDim);
  float* const grad_out_tile = q_tile + tile_floats(Tile::kQueries, kHeadDim);
  float* const weights = grad_out_tile + tile_floats(Tile::kQueries, kHeadDim);

  const int32_t kv_head = static_cast<int32_t>(blockIdx.y), stream = static_cast<int32_t>(blockIdx.z);
  const int32_t heads_per_kv_head = params.num_heads / params.num_kv_heads;
  const KeyTile keys = find_key_tile<Tile::kKeys>(params, stream, kv_head, past_tiles);
  if (keys.rows.count <= 0) return;
  const KeySource<float> k_source{params, stream, kv_head, false}, v_source{params, stream, kv_head, true};

  {
    Fetch<Tile::kKeys, kHeadDim> fetch;
    fetch.load(k_source, keys.rows, params.head_dim);
    fetch.store(k_tile, k_source, keys.rows, params.head_dim);
    fetch.load(v_source, keys.rows, params.head_dim);
    fetch.store(v_tile, v_source, keys.rows, params.head_dim);
  }

  const float bias = k_source.bias(keys.rows);
  Accumulator<Tile::kKeys, kHeadDim> grad_k, grad_v;
  for (int32_t head = kv_head * heads_per_kv_head; head < (kv_head + 1) * heads_per_kv_head; ++head) {
    ColumnTiles<Tile::kQueries> query_tiles =
        keys.rows.in_past() ? ColumnTiles<Tile::kQueries>(params.num_queries)
                            : ColumnTiles<Tile::kQueries>(params.query_spans, keys.block, params.num_queries);
    for (ColumnTile queries; query_tiles.next(queries);) {
      Fetch<Tile::kQueries, kHeadDim> q_fetch, grad_out_fetch;
      q_fetch.load(head_rows<const float>(params.q, stream, head), queries.start, queries.count, params.head_dim);
      grad_out_fetch.load(head_rows<const float>(params.grad_out, stream, head), queries.start, queries.count,
                          params.head_dim);
      const int64_t first_row = row_of_head(params, stream, head) + queries.start;
      RowStatistics statistics[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const int column = thread_x() + j * kRowThreads;
        statistics[j] = read_statistics(params, first_row, column, column < queries.count);
      }
      __syncthreads();  // the queries of the tile before are used up
      q_fetch.store(q_tile);
      grad_out_fetch.store(grad_out_tile);
      __syncthreads();
      Scores<Tile::kKeys, Tile::kQueries> probabilities, grad;
      multiply<kHeadDim>(probabilities, k_tile, q_tile, params.head_dim);
      multiply<kHeadDim>(grad, v_tile, grad_out_tile, params.head_dim);
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          probabilities.at[i][j] = expf(fmaf(probabilities.at[i][j], params.softmax_scale, bias - statistics[j].lse));
          grad.at[i][j] = probabilities.at[i][j] * (grad.at[i][j] - statistics[j].delta);
        }
      share(probabilities, weights);
      grad_v.template add<Tile::kQueries>(weights, grad_out_tile, queries.count);
      share(grad, weights);
      grad_k.template add<Tile::kQueries>(weights, q_tile, queries.count);
    }
  }

#pragma unroll
  for (int i = 0; i < kM; ++i) grad_k.scale(i, params.softmax_scale);
  if (keys.rows.in_past()) {
    grad_k.add_to_past(params, k_source, keys.rows);
    grad_v.add_to_past(params, v_source, keys.rows);
    return;
  }
  grad_k.store(head_rows<float>(params.grad_k, stream, kv_head), keys.rows.start, keys.rows.count, params.head_dim);
  grad_v.store(head_rows<float>(params.grad_v, stream, kv_head), keys.rows.start, keys.rows.count, params.head_dim);
}

template <int kHeadDim>
int32_t launch_float32_backward(const AttentionBackwardParams& params) {
  if (const int32_t error = launch_delta<float>(params)) return error;
  const unsigned batch = static_cast<unsigned>(params.batch);
  using QTile = Float32GradQTile<kHeadDim>;
  const dim3 q_grid(max_row_tiles(params.num_queries, params.spans, QTile::kQueries),
                    static_cast<unsigned>(params.num_heads), batch);
  if (const int32_t error = ptx::launch(float32_grad_q_kernel<kHeadDim>, q_grid, dim3(kThreads), QTile::kSharedBytes,
                                        params.stream, params))
    return error;
  using KVTile = Float32GradKVTile<kHeadDim>;
  const unsigned past_tiles = max_past_tiles(params, KVTile::kKeys);
  const dim3 kv_grid(past_tiles + max_row_tiles(params.num_keys, params.query_spans, KVTile::kKeys),
                     static_cast<unsigned>(params.num_kv_heads), batch);
  return ptx::launch(float32_grad_kv_kernel<kHeadDim>, kv_grid, dim3(kThreads), KVTile::kSharedBytes, params.stream,
                     params, past_tiles);
}

}  // namespace selfforcing::attention_cuda
