// Gradients of attention on tensor cores, in three passes without atomics, so that the same inputs give the same bits:
// delta per query (cuda_statistics.cuh); grad_q by tiles of queries over the keys they see; grad_k and grad_v by tiles
// of keys over the queries that see them (FlashAttention-2, arXiv 2307.08691, section 3.1.2, with the loops apart).
// Probabilities are computed anew from lse and never leave the registers.
//
// With fewer tiles of queries than multiprocessors, several thread blocks share a tile of grad_q.
#pragma once
#include "cuda_mma_tiles.cuh"
#include "cuda_parts.cuh"
#include "cuda_schedule.cuh"
#include "cuda_statistics.cuh"

namespace selfforcing::attention_cuda {

// A tile of rows stays while tiles of columns pass, in as many buffers as fit: with two, one is filled during the
// products with the other.
template <typename T, int kHeadDim, int kTileColumns>
struct MmaBackwardTile {
  static constexpr int kRows = kMmaWarps * kFragmentRows, kColumns = kTileColumns;
  static constexpr int kStages = kHeadDim <= 128 ? 2 : 1;
  using RowsTile = SharedTile<T, kRows, kHeadDim>;
  using ColumnsTile = SharedTile<T, kColumns, kHeadDim>;
  static constexpr int kSharedBytes = 2 * RowsTile::kBytes + 2 * kStages * ColumnsTile::kBytes;
  static_assert(kSharedBytes <= ptx::kMaxSharedBytes);
};

template <typename T, int kHeadDim>
using MmaGradQTile = MmaBackwardTile<T, kHeadDim, kHeadDim <= 128 ? 64 : 32>;
// Sums for grad_k and grad_v leave registers for fewer columns.
template <typename T, int kHeadDim>
using MmaGradKVTile = MmaBackwardTile<T, kHeadDim, kHeadDim <= 64 ? 64 : 32>;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMmaThreads, kOneBlock)
    mma_grad_q_kernel(const AttentionBackwardParams params, const GradientParts parts) {
  using Tile = MmaGradQTile<T, kHeadDim>;
  constexpr int kN = Tile::kColumns / kFragmentColumns;
  SELFFORCING_DYNAMIC_SHARED(shared);
  const typename Tile::RowsTile q_tile(shared), grad_out_tile(shared + Tile::RowsTile::kBytes);
  unsigned char* const stages = shared + 2 * Tile::RowsTile::kBytes;
  const auto key_tile = [&](int stage, bool values) {
    return typename Tile::ColumnsTile(stages + (2 * stage + values) * Tile::ColumnsTile::kBytes);
  };

  const RowTile queries =
      find_row_tile<Tile::kRows>(params.spans, params.num_queries,
                                 static_cast<int32_t>(gridDim.x - 1 - blockIdx.x));  // longest first
  if (queries.count <= 0) return;
  const int32_t part = static_cast<int32_t>(blockIdx.z) % parts.parts;
  const int32_t stream = static_cast<int32_t>(blockIdx.z) / parts.parts, head = static_cast<int32_t>(blockIdx.y);
  const int32_t kv_head = head / (params.num_heads / params.num_kv_heads);
  q_tile.copy(head_rows<const T>(params.q, stream, head), queries.start, queries.count, params.head_dim);
  grad_out_tile.copy(head_rows<const T>(params.grad_out, stream, head), queries.start, queries.count, params.head_dim);
  const int first_row = warp() * kFragmentRows;
  const int64_t row_of_tile = row_of_head(params, stream, head) + queries.start;
  RowStatistics statistics[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + row_in_fragment(i);
    statistics[i] = read_statistics(params, row_of_tile, row, row < queries.count);
  }

  const auto source = [&](bool values) { return KeySource<T>{params, stream, kv_head, values}; };
  const float scale_log2 = params.softmax_scale * kLog2E;
  Fragments<1, kHeadDim / kFragmentColumns> grad_q;
  ColumnTiles<Tile::kColumns> key_tiles(params.spans, queries.block, params.num_keys);
  key_tiles.prepend(params.past, stream, kv_head);
  key_tiles.take_every(parts.parts, part);
  stream_tiles<Tile::kStages, ColumnTile>(
      [&](ColumnTile& keys) { return key_tiles.next(keys); },
      [&](const ColumnTile& keys, int stage) {
        key_tile(stage, false).copy(source(false), keys, params.head_dim);
        key_tile(stage, true).copy(source(true), keys, params.head_dim);
      },
      [&](const ColumnTile& keys, int stage) {
        key_tile(stage, false).decode(source(false), keys, params.head_dim);
        key_tile(stage, true).decode(source(true), keys, params.head_dim);
      },
      [&](const ColumnTile& keys, int stage) {
        Fragments<1, kN> scores, grad;
        multiply_transposed(scores, q_tile, first_row, key_tile(stage, false));
        multiply_transposed(grad, grad_out_tile, first_row, key_tile(stage, true));  // of the probabilities
        const float bias_log2 = source(false).bias_log2(keys);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const bool visible = column_in_fragments(n, j) < keys.count;
              const float score = fmaf(scores.at[0][n][2 * i + j], scale_log2, bias_log2 - statistics[i].lse_log2);
              const float probability = visible ? ptx::fast_exp2(score) : 0.0f;
              grad.at[0][n][2 * i + j] = probability * (grad.at[0][n][2 * i + j] - statistics[i].delta);
            }
        add_product(grad_q, grad, key_tile(stage, false));
      });
  if (parts.parts > 1)
    store_sums(grad_q, params.softmax_scale, parts.at(part * parts.rows + row_of_tile), queries.count, params.head_dim);
  else
    store_rows(grad_q, params.softmax_scale, q_tile, head_rows<T>(params.grad_q, stream, head), queries.start,
               queries.count, params.head_dim);
}

// Joins the parts of every query, one warp each.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads)
    join_grad_q_kernel(const AttentionBackwardParams params, const GradientParts parts) {
  const int32_t query = static_cast<int32_t>(blockIdx.x) * kJoinRows + warp();
  if (query >= params.num_queries) return;
  const Place place = place_of_query_head(params);
  parts.join(row_of_head(params, place.stream, place.head) + query,
             head_rows<T>(params.grad_q, place.stream, place.head).at(query));
}

// Adds factor * sums, a warp's rows of a tile of the past, to the pages of gradients.
template <typename T, int kD>
__device__ __forceinline__ void add_past_rows(const Fragments<1, kD>& sums, float factor, const KeySource<T>& source,
                                              const AttentionBackwardParams& params, const ColumnTile& tile) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp() * kFragmentRows + row_in_fragment(i);
    if (row >= tile.count) continue;
#pragma unroll
    for (int d = 0; d < kD; ++d) {
      if (d * kFragmentColumns >= params.head_dim) continue;
      const float grads[2] = {sums.at[0][d][2 * i] * factor, sums.at[0][d][2 * i + 1] * factor};
      add_past_gradient(params, source, tile, row, column_in_fragments(d, 0), grads);
    }
  }
}

// Which of its gradients a launch of mma_grad_kv_kernel computes: where one thread cannot hold the sums of both, a
// launch each.
enum class GradsOf { keys, values, both };

// Rows are keys and columns queries here. A K/V head gathers from all query heads that read it, one after the other.
// The first `past_tiles` thread blocks in x take tiles of the past, which every query of the call sees.
template <typename T, int kHeadDim, GradsOf kGrads>
__global__ void __launch_bounds__(kMmaThreads, kOneBlock)
    mma_grad_kv_kernel(const AttentionBackwardParams params, unsigned past_tiles) {
  using Tile = MmaGradKVTile<T, kHeadDim>;
  constexpr int kN = Tile::kColumns / kFragmentColumns;
  constexpr bool kKeys = kGrads != GradsOf::values, kValues = kGrads != GradsOf::keys;
  SELFFORCING_DYNAMIC_SHARED(shared);
  const typename Tile::RowsTile k_tile(shared), v_tile(shared + Tile::RowsTile::kBytes);
  unsigned char* const stages = shared + 2 * Tile::RowsTile::kBytes;
  const auto query_tile = [&](int stage, bool grad) {
    return typename Tile::ColumnsTile(stages + (2 * stage + grad) * Tile::ColumnsTile::kBytes);
  };

  const int32_t kv_head = static_cast<int32_t>(blockIdx.y), stream = static_cast<int32_t>(blockIdx.z);
  const int32_t heads_per_kv_head = params.num_heads / params.num_kv_heads;
  const KeyTile keys = find_key_tile<Tile::kRows>(params, stream, kv_head, past_tiles);
  if (keys.rows.count <= 0) return;
  const KeySource<T> k_source{params, stream, kv_head, false}, v_source{params, stream, kv_head, true};
  k_tile.copy(k_source, keys.rows, params.head_dim);
  v_tile.copy(v_source, keys.rows, params.head_dim);
  if (keys.rows.in_past()) {
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    k_tile.decode(k_source, keys.rows, params.head_dim);
    v_tile.decode(v_source, keys.rows, params.head_dim);
  }

  struct QueryTile {
    int32_t head;
    ColumnTile queries;
  };
  int32_t head = kv_head * heads_per_kv_head;
  const ColumnTiles<Tile::kColumns> tiles_of_a_head =
      keys.rows.in_past() ? ColumnTiles<Tile::kColumns>(params.num_queries)
                          : ColumnTiles<Tile::kColumns>(params.query_spans, keys.block, params.num_queries);
  ColumnTiles<Tile::kColumns> query_tiles = tiles_of_a_head;

  const float scale_log2 = params.softmax_scale * kLog2E, bias_log2 = k_source.bias_log2(keys.rows);
  const int first_row = warp() * kFragmentRows;
  Fragments<1, kHeadDim / kFragmentColumns> grad_k, grad_v;
  stream_tiles<Tile::kStages, QueryTile>(
      [&](QueryTile& tile) {
        while (!query_tiles.next(tile.queries)) {
          if (++head == (kv_head + 1) * heads_per_kv_head) return false;
          query_tiles = tiles_of_a_head;
        }
        tile.head = head;
        return true;
      },
      [&](const QueryTile& tile, int stage) {
        query_tile(stage, false)
            .copy(head_rows<const T>(params.q, stream, tile.head), tile.queries.start, tile.queries.count,
                  params.head_dim);
        query_tile(stage, true)
            .copy(head_rows<const T>(params.grad_out, stream, tile.head), tile.queries.start, tile.queries.count,
                  params.head_dim);
      },
      [](const QueryTile&, int) {},  // queries are stored as the products take them
      [&](const QueryTile& tile, int stage) {
        const int64_t row_of_tile = row_of_head(params, stream, tile.head) + tile.queries.start;
        Fragments<1, kN> probabilities, grad;
        multiply_transposed(probabilities, k_tile, first_row, query_tile(stage, false));
        if constexpr (kKeys) multiply_transposed(grad, v_tile, first_row, query_tile(stage, true));
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int query = column_in_fragments(n, j);
            const RowStatistics statistics = read_statistics(params, row_of_tile, query, query < tile.queries.count);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& probability = probabilities.at[0][n][2 * i + j];
              probability = ptx::fast_exp2(fmaf(probability, scale_log2, bias_log2 - statistics.lse_log2));
              if constexpr (kKeys)
                grad.at[0][n][2 * i + j] = probability * (grad.at[0][n][2 * i + j] - statistics.delta);
            }
          }
        if constexpr (kValues) add_product(grad_v, probabilities, query_tile(stage, true));
        if constexpr (kKeys) add_product(grad_k, grad, query_tile(stage, false));
      });
  if (keys.rows.in_past()) {
    if constexpr (kKeys) add_past_rows(grad_k, params.softmax_scale, k_source, params, keys.rows);
    if constexpr (kValues) add_past_rows(grad_v, 1.0f, v_source, params, keys.rows);
    return;
  }
  if constexpr (kKeys)
    store_rows(grad_k, params.softmax_scale, k_tile, head_rows<T>(params.grad_k, stream, kv_head), keys.rows.start,
               keys.rows.count, params.head_dim);
  if constexpr (kValues)
    store_rows(grad_v, 1.0f, v_tile, head_rows<T>(params.grad_v, stream, kv_head), keys.rows.start, keys.rows.count,
               params.head_dim);
}

template <typename T, int kHeadDim>
GradientParts parts_of_grad_q(const AttentionBackwardParams& params) {
  using Tile = MmaGradQTile<T, kHeadDim>;
  return {parts_of_keys(params, Tile::kRows, Tile::kColumns), params.head_dim, num_query_rows(params),
          static_cast<float*>(params.workspace)};
}

template <typename T, int kHeadDim>
int64_t mma_backward_workspace_bytes(const AttentionBackwardParams& params) {
  return parts_of_grad_q<T, kHeadDim>(params).bytes();
}

template <typename T, int kHeadDim>
int32_t launch_mma_grad_q(const AttentionBackwardParams& params) {
  using Tile = MmaGradQTile<T, kHeadDim>;
  const GradientParts parts = parts_of_grad_q<T, kHeadDim>(params);
  const unsigned heads = static_cast<unsigned>(params.num_heads), batch = static_cast<unsigned>(params.batch);
  const dim3 grid(max_row_tiles(params.num_queries, params.spans, Tile::kRows), heads,
                  batch * static_cast<unsigned>(parts.parts));
  const int32_t error = ptx::launch(mma_grad_q_kernel<T, kHeadDim>, grid, dim3(kMmaThreads), Tile::kSharedBytes,
                                    params.stream, params, parts);
  if (error != 0 || parts.parts == 1) return error;
  const dim3 join_grid((static_cast<unsigned>(params.num_queries) + kJoinRows - 1) / kJoinRows, heads, batch);
  return ptx::launch(join_grad_q_kernel<T>, join_grid, dim3(kJoinThreads), 0, params.stream, params, parts);
}

template <typename T, int kHeadDim>
int32_t launch_mma_backward(const AttentionBackwardParams& params) {
  if (const int32_t error = launch_delta<T>(params)) return error;
  if (const int32_t error = launch_mma_grad_q<T, kHeadDim>(params)) return error;
  using KVTile = MmaGradKVTile<T, kHeadDim>;
  const unsigned past_tiles = max_past_tiles(params, KVTile::kRows);
  const dim3 kv_grid(past_tiles + max_row_tiles(params.num_keys, params.query_spans, KVTile::kRows),
                     static_cast<unsigned>(params.num_kv_heads), static_cast<unsigned>(params.batch));
  const auto launch_kv = [&](auto* kernel) {
    return ptx::launch(kernel, kv_grid, dim3(kMmaThreads), KVTile::kSharedBytes, params.stream, params, past_tiles);
  };
  if constexpr (kHeadDim <= 128) {
    return launch_kv(mma_grad_kv_kernel<T, kHeadDim, GradsOf::both>);
  } else {
    if (const int32_t error = launch_kv(mma_grad_kv_kernel<T, kHeadDim, GradsOf::keys>)) return error;
    return launch_kv(mma_grad_kv_kernel<T, kHeadDim, GradsOf::values>);
  }
}

}  // namespace selfforcing::attention_cuda
