// Gradients of attention on Hopper's own instructions, in the three passes of cuda_mma_backward.cuh, so that the same
// inputs give the same bits: delta per query; grad_q by tiles of queries over the keys they see; grad_k and grad_v by
// tiles of keys over the queries that see them. docs/performance.md says why not in one pass.
//
// In both kernels one warp, the producer, asks for copies as far ahead as there are buffers. Consumers, warpgroups with
// 64 rows each, share the tiles of columns that pass. Scores, [rows, columns], are laid out so that what becomes of
// them in registers is the left factor of the next product: by queries for grad_q, by keys (transposed) for grad_k and
// grad_v. While a consumer computes probabilities, its products with grad_out run; while it ends a tile, the scores of
// the next one are on their way.
//
// The grids are as large as the GPU. What does not fill a last round is split over columns; a third kernel adds the
// parts.
#pragma once
#include <algorithm>

#include "cuda_hopper_keys.cuh"
#include "cuda_parts.cuh"
#include "cuda_schedule.cuh"
#include "cuda_statistics.cuh"

namespace selfforcing::attention_cuda {

template <typename T, int kHeadDim, int kTileColumns, int kTileStages>
struct HopperBackwardTile {
  using Block = HopperBlock<2>;
  static constexpr int kRows = Block::kConsumers * kWarpgroupRows, kColumns = kTileColumns, kStages = kTileStages;
  static constexpr int kClearBarrier = 1;  // the named barrier of all consumers

  using Rows = HopperTile<T, kRows, kHeadDim>;
  using Columns = HopperTile<T, kColumns, kHeadDim>;
};

template <typename T, int kHeadDim>
using HopperGradQTile = HopperBackwardTile<T, kHeadDim, 128, kHeadDim <= 64 ? 4 : 2>;
// Two sums stay in registers, which leaves room for fewer columns.
template <typename T, int kHeadDim>
using HopperGradKVTile = HopperBackwardTile<T, kHeadDim, kHeadDim <= 64 ? 96 : 64, 4>;

// A tile of rows, or a part of its columns.
struct BackwardWork {
  ColumnTile rows;       // no rows: the end
  int32_t first = 0;     // row of the buffer
  int32_t stream, head;  // of queries, or of keys
  int32_t sees_columns;
  int32_t row_of_parts;  // where gradients of the buffer's rows go; negative: they are whole

  __device__ __forceinline__ bool has(int row) const { return row >= first && row < first + rows.count; }
};

// What a consumer is told of a tile of columns.
struct alignas(16) BackwardColumns {
  int32_t first, end;  // the columns that count
  float bias_log2;
  int32_t last;  // of this work
};

constexpr int kTilesOfRows = 2;

// Of queries `left` is q and `right` is grad_out, of keys `left` is k and `right` is v: scores are products of the
// left ones, gradients of probabilities of the right ones.
template <typename Tile>
struct HopperBackwardShared {
  static constexpr int kStages = Tile::kStages;

  alignas(1024) unsigned char left_rows[Tile::Rows::kBytes], right_rows[Tile::Rows::kBytes];
  alignas(1024) unsigned char left_columns[kStages][Tile::Columns::kBytes];
  alignas(1024) unsigned char right_columns[kStages][Tile::Columns::kBytes];
  alignas(16) float lse_log2[kStages][Tile::kColumns], delta[kStages][Tile::kColumns];  // where columns are queries
  BufferBarriers<1> row_barriers;
  BufferBarriers<kStages> left_barriers, right_barriers;
  BackwardWork work[2];  // of one tile of rows the consumers know until they have written it, the other is next
  BackwardColumns tiles[kStages];
};

template <typename Tile>
__device__ __forceinline__ HopperBackwardShared<Tile>& backward_shared(unsigned char* bytes) {
  auto& shared = *reinterpret_cast<HopperBackwardShared<Tile>*>(bytes);
  if (threadIdx.x == 0) {
    shared.row_barriers.init(Tile::Block::kConsumerWarps, kTilesOfRows);
    shared.left_barriers.init(Tile::Block::kConsumerWarps);
    shared.right_barriers.init(Tile::Block::kConsumerWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  return shared;
}

// By all lanes of the producer: tells the consumers of a tile of rows, and if they see any columns asks for its two
// tiles of rows: load(barrier), with an arrival for each.
template <typename Tile, typename Load>
__device__ __forceinline__ void hand_out(const BackwardWork& work, unsigned use, HopperBackwardShared<Tile>& shared,
                                         const Load& load) {
  const BufferPosition<1> rows{use};
  rows.wait_empty(shared.row_barriers);
  const ptx::SharedAddress full = rows.full(shared.row_barriers);
  if (lane() == 0) shared.work[use % 2] = work;
  __syncwarp();
  if (work.sees_columns)
    load(full);
  else if (lane() < kTilesOfRows)
    ptx::barrier_arrive(full);
}
// That there is nothing more.
template <typename Tile>
__device__ __forceinline__ void hand_out_end(unsigned use, HopperBackwardShared<Tile>& shared) {
  hand_out({}, use, shared, [](ptx::SharedAddress) {});
}

// The row of parts where those of an item begin.
template <typename Tile>
__device__ __forceinline__ int32_t row_of_parts(const GradientParts& parts, const TilePart& item) {
  return item.shared_tile < 0 ? -1 : item.part * static_cast<int32_t>(parts.rows) + item.shared_tile * Tile::kRows;
}

// Calls write(row of the buffer, channel, grads) for what this lane has of factor * sums, a consumer's rows of a tile.
template <int kHeadDim, typename Write>
__device__ __forceinline__ void write_gradients(int32_t head_dim, const BackwardWork& work, int first, float factor,
                                                const float (&sums)[kHeadDim / 2], const Write& write) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + row_in_fragment(i);
    if (!work.has(row)) continue;
#pragma unroll
    for (int d = 0; d < kHeadDim / kFragmentColumns; ++d) {
      if (d * kFragmentColumns >= head_dim) continue;
      const float grads[2] = {sums[4 * d + 2 * i] * factor, sums[4 * d + 2 * i + 1] * factor};
      write(row, column_in_fragments(d, 0), grads);
    }
  }
}

// To a tensor, or to the parts where they are one.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_gradients(const MutableHeads& tensor, const GradientParts& parts,
                                                const BackwardWork& work, int first, float factor,
                                                const float (&sums)[kHeadDim / 2]) {
  if (work.row_of_parts >= 0) {
    write_gradients<kHeadDim>(
        parts.head_dim, work, first, factor, sums, [&](int row, int channel, const float (&grads)[2]) {
          *reinterpret_cast<float2*>(parts.at(work.row_of_parts + row) + channel) = float2{grads[0], grads[1]};
        });
  } else {
    const Rows<T> rows = head_rows<T>(tensor, work.stream, work.head);
    write_gradients<kHeadDim>(parts.head_dim, work, first, factor, sums,
                              [&](int row, int channel, const float (&grads)[2]) {
                                T* const to = rows.at(work.rows.start + row - work.first) + channel;
                                *reinterpret_cast<unsigned*>(to) = ptx::pack_pair<T>(grads[0], grads[1]);
                              });
  }
}

// Adds them to the pages of gradients.
template <typename T, int kHeadDim>
__device__ __forceinline__ void add_past_gradients(const AttentionBackwardParams& params, const BackwardWork& work,
                                                   int first, bool values, float factor,
                                                   const float (&sums)[kHeadDim / 2]) {
  const KeySource<T> source{params, work.stream, work.head, values};
  write_gradients<kHeadDim>(params.head_dim, work, first, factor, sums,
                            [&](int row, int channel, const float (&grads)[2]) {
                              add_past_gradient(params, source, work.rows, row - work.first, channel, grads);
                            });
}

// The first row of this warp in a tile of rows.
__device__ __forceinline__ int first_row_of_warp(int group) {
  return group * kWarpgroupRows + warp() % kWarpgroupWarps * kFragmentRows;
}

// ---- grad_q: rows are queries, columns keys

struct GradQMaps {
  ptx::TensorMap q, grad_out;
  KeyMaps keys;
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void produce_grad_q(const AttentionBackwardParams& params, const GradQMaps& maps,
                                               const RoundSchedule& schedule, const GradientParts& parts,
                                               HopperBackwardShared<HopperGradQTile<T, kHeadDim>>& shared) {
  using Tile = HopperGradQTile<T, kHeadDim>;
  using Columns = typename Tile::Columns;
  BufferPosition<Tile::kStages> keys;
  for (unsigned use = 0;; ++use) {
    const TilePart item = schedule.at(item_of_round(static_cast<int32_t>(use)));
    const RowTile rows =
        find_row_tile<Tile::kRows, true>(params.spans, params.num_queries, item.tile, params.batch * params.num_heads);
    if (rows.count == 0) {
      hand_out_end(use, shared);
      return;
    }
    const int32_t stream = rows.copy / params.num_heads, head = rows.copy % params.num_heads;
    const int32_t kv_head = head / (params.num_heads / params.num_kv_heads);
    ColumnTiles<Tile::kColumns> tiles(params.spans, rows.block, params.num_keys);
    tiles.prepend(params.past, stream, kv_head);
    tiles.align_past(maps.keys.page_rows);
    tiles.take_every(item.parts, item.part);
    ColumnTile tile;
    bool more = tiles.next(tile);
    hand_out({{rows.start, rows.count, -1}, 0, stream, head, more, row_of_parts<Tile>(parts, item)}, use, shared,
             [&](ptx::SharedAddress full) {
               if (lane() >= kTilesOfRows) return;
               const bool right = lane() == 1;
               ptx::barrier_arrive_expect(full, Tile::Rows::kBytes);
               typename Tile::Rows(right ? shared.right_rows : shared.left_rows)
                   .load(right ? maps.grad_out : maps.q, full, 0, rows.start, head, stream);
             });
    for (; more; ++keys.use) {
      const ColumnTile now = tile;
      more = tiles.next(tile);
      keys.wait_empty(shared.left_barriers);
      const int first = first_row(maps.keys, now);
      if (lane() == 0)
        shared.tiles[keys.stage()] = {first, first + now.count,
                                      KeySource<T>{params, stream, kv_head, false}.bias_log2(now), !more};
      load_keys(params, maps.keys, now, stream, kv_head, false, Columns(shared.left_columns[keys.stage()]),
                keys.full(shared.left_barriers));
      keys.wait_empty(shared.right_barriers);
      load_keys(params, maps.keys, now, stream, kv_head, true, Columns(shared.right_columns[keys.stage()]),
                keys.full(shared.right_barriers));
    }
  }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume_grad_q(const AttentionBackwardParams& params, const GradientParts& parts,
                                               int group, HopperBackwardShared<HopperGradQTile<T, kHeadDim>>& shared) {
  using Tile = HopperGradQTile<T, kHeadDim>;
  using Columns = typename Tile::Columns;
  constexpr int kSums = Tile::kColumns / 2;
  const typename Tile::Rows q_tile(shared.left_rows), grad_out_tile(shared.right_rows);
  const float scale_log2 = params.softmax_scale * kLog2E;
  const int row_of_group = group * kWarpgroupRows, row_of_warp = first_row_of_warp(group);
  BufferPosition<1> rows;
  BufferPosition<Tile::kStages> keys;

  // Waits for the newest keys and asks for their scores.
  const auto multiply_keys = [&](float (&scores)[kSums]) {
    keys.wait_full(shared.left_barriers);
    const Columns k_tile(shared.left_columns[keys.stage()]);
    const BackwardColumns& known = shared.tiles[keys.stage()];
    if (known.first > 0 || known.end < Tile::kColumns) {
      clear_invisible(k_tile, known.first, known.end, Tile::Block::kConsumerThreads);
      ptx::named_barrier_sync(Tile::kClearBarrier, Tile::Block::kConsumerThreads);
    }
    ptx::warpgroup_arrive(scores);
    multiply_transposed(scores, q_tile, row_of_group, k_tile);
    ptx::warpgroup_commit();
  };

  for (;; ++rows.use) {
    rows.wait_full(shared.row_barriers);
    const BackwardWork& work = shared.work[rows.use % 2];
    if (work.rows.count == 0) return;
    float grad_q[kHeadDim / 2] = {};
    if (work.sees_columns) {
      float offset[2], delta[2];  // minus lse, in units of log2
      const int64_t row_of_tile = row_of_head(params, work.stream, work.head) + work.rows.start;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = row_of_warp + row_in_fragment(i);
        const RowStatistics statistics = read_statistics(params, row_of_tile, row, work.has(row));
        offset[i] = -statistics.lse_log2, delta[i] = statistics.delta;
      }
      // Gradients of scores. The products with one half of them begin while the other half is computed.
      constexpr int kParts = 2, kColumnsOfPart = Tile::kColumns / kParts, kSumsOfPart = kSums / kParts;
      RegisterFactor<kColumnsOfPart> weights[kParts];
      // Ends the tile whose scores were asked for.
      const auto weigh = [&](float (&scores)[kSums]) {
        const BackwardColumns known = shared.tiles[keys.stage()];
        float grad[kSums];
        keys.wait_full(shared.right_barriers);
        ptx::warpgroup_arrive(grad);
        multiply_transposed(grad, grad_out_tile, row_of_group, Columns(shared.right_columns[keys.stage()]));
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<1>(scores);
#pragma unroll
        for (int i = 0; i < kSums; ++i)
          scores[i] = ptx::fast_exp2(fmaf(scores[i], scale_log2, known.bias_log2 + offset[i / 2 % 2]));
        ptx::warpgroup_wait<0>(grad);
        keys.release(shared.right_barriers);
        if (known.last) rows.release(shared.row_barriers);
        const bool all_visible = known.first == 0 && known.end == Tile::kColumns;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          float part_of_grad[kSumsOfPart];
#pragma unroll
          for (int i = 0; i < kSumsOfPart; ++i) {
            const int at = part * kSumsOfPart + i;
            part_of_grad[i] = scores[at] * (grad[at] - delta[at / 2 % 2]);
          }
          if (!all_visible) {  // the values there may be anything
#pragma unroll
            for (int i = 0; i < kSumsOfPart; ++i) {
              const int column = part * kColumnsOfPart + column_in_fragments(i / 4, i % 2);
              if (column < known.first || column >= known.end) part_of_grad[i] = 0.0f;
            }
          }
          round_sums<T>(weights[part], part_of_grad);
          ptx::warpgroup_arrive(grad_q);
          add_product(grad_q, weights[part], Columns(shared.left_columns[keys.stage()]), part * kColumnsOfPart);
        }
        ptx::warpgroup_commit();
        return known.last != 0;
      };

      float scores[kSums];
      multiply_keys(scores);
      while (!weigh(scores)) {
        const BufferPosition<Tile::kStages> used = keys;
        ++keys.use;
        multiply_keys(scores);
        ptx::warpgroup_wait<1>(grad_q);
        used.release(shared.left_barriers);
      }
      ptx::warpgroup_wait<0>(grad_q);
      keys.release(shared.left_barriers);
      ++keys.use;
    } else {
      rows.release(shared.row_barriers);
    }
    store_gradients<T, kHeadDim>(params.grad_q, parts, work, row_of_warp, params.softmax_scale, grad_q);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(HopperGradQTile<T, kHeadDim>::Block::kThreads, kOneBlock)
    hopper_grad_q_kernel(const AttentionBackwardParams params, const __grid_constant__ GradQMaps maps,
                         const RoundSchedule schedule, const GradientParts parts) {
  using Tile = HopperGradQTile<T, kHeadDim>;
  SELFFORCING_DYNAMIC_SHARED(bytes);
  auto& shared = backward_shared<Tile>(bytes);
  Tile::Block::run([&] { produce_grad_q<T, kHeadDim>(params, maps, schedule, parts, shared); },
                   [&](int group) { consume_grad_q<T, kHeadDim>(params, parts, group, shared); });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kJoinThreads)
    join_grad_q_tiles_kernel(const AttentionBackwardParams params, const GradQMaps /*maps*/,
                             const RoundSchedule schedule, const GradientParts parts) {
  constexpr int kRows = HopperGradQTile<T, kHeadDim>::kRows;
  const int32_t shared_row = static_cast<int32_t>(blockIdx.x) * kJoinRows + warp(), row = shared_row % kRows;
  const RowTile tile = find_row_tile<kRows, true>(
      params.spans, params.num_queries, schedule.whole_tiles + shared_row / kRows, params.batch * params.num_heads);
  if (row >= tile.count) return;
  const int32_t stream = tile.copy / params.num_heads, head = tile.copy % params.num_heads;
  parts.join(shared_row, head_rows<T>(params.grad_q, stream, head).at(tile.start + row));
}

// ---- grad_k and grad_v: rows are keys, columns the queries of all heads that read them

struct GradKVMaps {
  KeyMaps keys;
  ptx::TensorMap q, grad_out;
  int32_t past_tiles;  // of all heads and streams; they come first, since every query sees them
};

// A tile of keys of one head, of the past or in a block of query_spans; no keys in a tile that the past does not need,
// and in those after the last one.
struct HopperKeyTile {
  ColumnTile rows;
  int32_t block, stream, kv_head;
};
template <typename Tile>
__device__ __forceinline__ HopperKeyTile find_hopper_key_tile(const AttentionBackwardParams& params,
                                                              const GradKVMaps& maps, int32_t tile) {
  const int32_t copies = params.batch * params.num_kv_heads;
  if (tile < maps.past_tiles) {
    const int32_t stream = tile % copies / params.num_kv_heads, kv_head = tile % copies % params.num_kv_heads;
    return {past_tile<typename Tile::Rows>(params.past, maps.keys, stream, kv_head, tile / copies), 0, stream, kv_head};
  }
  const RowTile own = find_row_tile<Tile::kRows>(params.query_spans, params.num_keys, tile - maps.past_tiles, copies);
  return {{own.start, own.count, -1}, own.block, own.copy / params.num_kv_heads, own.copy % params.num_kv_heads};
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void produce_grad_kv(const AttentionBackwardParams& params, const GradKVMaps& maps,
                                                const RoundSchedule& schedule, const GradientParts& parts,
                                                HopperBackwardShared<HopperGradKVTile<T, kHeadDim>>& shared) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  using Columns = typename Tile::Columns;
  constexpr int kOfLane = Tile::kColumns / kWarpSize;  // queries whose statistics a lane brings
  const int32_t heads_per_kv_head = params.num_heads / params.num_kv_heads;
  BufferPosition<Tile::kStages> queries;
  unsigned use = 0;
  for (int32_t round = 0;; ++round) {
    const TilePart item = schedule.at(item_of_round(round));
    const auto [keys, block, stream, kv_head] = find_hopper_key_tile<Tile>(params, maps, item.tile);
    const bool in_past = item.tile < maps.past_tiles;
    if (keys.count == 0 && in_past) continue;
    if (keys.count == 0) {
      hand_out_end(use, shared);
      return;
    }
    const float bias_log2 = KeySource<T>{params, stream, kv_head, false}.bias_log2(keys);
    const ColumnTiles<Tile::kColumns> tiles_of_a_head =
        in_past ? ColumnTiles<Tile::kColumns>(params.num_queries)
                : ColumnTiles<Tile::kColumns>(params.query_spans, block, params.num_queries);
    ColumnTiles<Tile::kColumns> tiles = tiles_of_a_head;
    int32_t head = kv_head * heads_per_kv_head, skip = item.part;
    // The next tile of this part among those of one head after the other.
    const auto next = [&](ColumnTile& tile) {
      for (;; --skip) {
        while (!tiles.next(tile)) {
          if (++head == (kv_head + 1) * heads_per_kv_head) return false;
          tiles = tiles_of_a_head;
        }
        if (skip == 0) break;
      }
      skip = item.parts - 1;
      return true;
    };
    ColumnTile tile;
    bool more = next(tile);
    hand_out({keys, first_row(maps.keys, keys), stream, kv_head, more, row_of_parts<Tile>(parts, item)}, use++, shared,
             [&](ptx::SharedAddress full) {
               for (const bool values : {false, true})
                 load_keys(params, maps.keys, keys, stream, kv_head, values,
                           typename Tile::Rows(values ? shared.right_rows : shared.left_rows), full);
             });
    for (; more; ++queries.use) {
      const ColumnTile now = tile;
      const int32_t head_now = head;
      more = next(tile);
      RowStatistics statistics[kOfLane];  // on their way while a buffer becomes empty
      const int64_t row_of_tile = row_of_head(params, stream, head_now) + now.start;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int query = i * kWarpSize + lane();
        statistics[i] = read_statistics(params, row_of_tile, query, query < now.count);
      }
      queries.wait_empty(shared.left_barriers);
      const int stage = queries.stage();
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        shared.lse_log2[stage][i * kWarpSize + lane()] = statistics[i].lse_log2 - bias_log2;
        shared.delta[stage][i * kWarpSize + lane()] = statistics[i].delta;
      }
      __syncwarp();
      if (lane() == 0) {
        shared.tiles[stage] = {0, now.count, 0.0f, !more};
        const ptx::SharedAddress full = queries.full(shared.left_barriers);
        ptx::barrier_arrive_expect(full, 2 * Columns::kBytes);
        Columns(shared.left_columns[stage]).load(maps.q, full, 0, now.start, head_now, stream);
        Columns(shared.right_columns[stage]).load(maps.grad_out, full, 0, now.start, head_now, stream);
      }
    }
  }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void consume_grad_kv(const AttentionBackwardParams& params, const GradientParts& k_parts,
                                                const GradientParts& v_parts, int group,
                                                HopperBackwardShared<HopperGradKVTile<T, kHeadDim>>& shared) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  using Columns = typename Tile::Columns;
  constexpr int kSums = Tile::kColumns / 2;
  const typename Tile::Rows k_tile(shared.left_rows), v_tile(shared.right_rows);
  const float scale_log2 = params.softmax_scale * kLog2E;
  const int row_of_group = group * kWarpgroupRows;
  BufferPosition<1> rows;
  BufferPosition<Tile::kStages> queries;

  // Waits for the newest queries and asks for their scores.
  const auto multiply_queries = [&](float (&scores)[kSums]) {
    queries.wait_full(shared.left_barriers);
    const int stage = queries.stage(), end = shared.tiles[stage].end;
    const Columns q_tile(shared.left_columns[stage]);
    if (end < Tile::kColumns) {
      clear_invisible(q_tile, 0, end, Tile::Block::kConsumerThreads);
      clear_invisible(Columns(shared.right_columns[stage]), 0, end, Tile::Block::kConsumerThreads);
      ptx::named_barrier_sync(Tile::kClearBarrier, Tile::Block::kConsumerThreads);
    }
    ptx::warpgroup_arrive(scores);
    multiply_transposed(scores, k_tile, row_of_group, q_tile);
    ptx::warpgroup_commit();
  };

  for (;; ++rows.use) {
    rows.wait_full(shared.row_barriers);
    const BackwardWork& work = shared.work[rows.use % 2];
    if (work.rows.count == 0) return;
    float grad_k[kHeadDim / 2] = {}, grad_v[kHeadDim / 2] = {};
    if (work.sees_columns) {
      RegisterFactor<Tile::kColumns> probabilities, weights;  // and gradients of scores
      // Ends the tile whose scores were asked for.
      const auto weigh = [&](float (&scores)[kSums]) {
        const int stage = queries.stage();
        const bool last = shared.tiles[stage].last != 0;
        // Of the two columns of a fragment that this lane has.
        const auto of_columns = [&](const float (&statistics)[Tile::kColumns], int n) {
          return *reinterpret_cast<const float2*>(&statistics[column_in_fragments(n, 0)]);
        };
        float grad[kSums];
        ptx::warpgroup_arrive(grad);
        multiply_transposed(grad, v_tile, row_of_group, Columns(shared.right_columns[stage]));
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<1>(scores);
#pragma unroll
        for (int n = 0; n < Tile::kColumns / kFragmentColumns; ++n) {
          const float2 lse_log2 = of_columns(shared.lse_log2[stage], n);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            scores[4 * n + i] =
                ptx::fast_exp2(fmaf(scores[4 * n + i], scale_log2, i % 2 == 0 ? -lse_log2.x : -lse_log2.y));
        }
        round_sums<T>(probabilities, scores);
        ptx::warpgroup_arrive(grad_v);
        add_product(grad_v, probabilities, Columns(shared.right_columns[stage]));
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<1>(grad);
        if (last) rows.release(shared.row_barriers);
#pragma unroll
        for (int n = 0; n < Tile::kColumns / kFragmentColumns; ++n) {
          const float2 delta = of_columns(shared.delta[stage], n);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            grad[4 * n + i] = scores[4 * n + i] * (grad[4 * n + i] - (i % 2 == 0 ? delta.x : delta.y));
        }
        round_sums<T>(weights, grad);
        ptx::warpgroup_arrive(grad_k);
        add_product(grad_k, weights, Columns(shared.left_columns[stage]));
        ptx::warpgroup_commit();
        return last;
      };

      float scores[kSums];
      multiply_queries(scores);
      while (!weigh(scores)) {
        const BufferPosition<Tile::kStages> used = queries;
        ++queries.use;
        multiply_queries(scores);
        ptx::warpgroup_wait<1>(grad_v, grad_k);
        used.release(shared.left_barriers);
      }
      ptx::warpgroup_wait<0>(grad_v, grad_k);
      queries.release(shared.left_barriers);
      ++queries.use;
    } else {
      rows.release(shared.row_barriers);
    }
    const int first = first_row_of_warp(group);
    if (work.rows.in_past() && work.row_of_parts < 0) {
      add_past_gradients<T, kHeadDim>(params, work, first, false, params.softmax_scale, grad_k);
      add_past_gradients<T, kHeadDim>(params, work, first, true, 1.0f, grad_v);
    } else {
      store_gradients<T, kHeadDim>(params.grad_k, k_parts, work, first, params.softmax_scale, grad_k);
      store_gradients<T, kHeadDim>(params.grad_v, v_parts, work, first, 1.0f, grad_v);
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(HopperGradKVTile<T, kHeadDim>::Block::kThreads, kOneBlock)
    hopper_grad_kv_kernel(const AttentionBackwardParams params, const __grid_constant__ GradKVMaps maps,
                          const RoundSchedule schedule, const GradientParts k_parts, const GradientParts v_parts) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  SELFFORCING_DYNAMIC_SHARED(bytes);
  auto& shared = backward_shared<Tile>(bytes);
  Tile::Block::run([&] { produce_grad_kv<T, kHeadDim>(params, maps, schedule, k_parts, shared); },
                   [&](int group) { consume_grad_kv<T, kHeadDim>(params, k_parts, v_parts, group, shared); });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kJoinThreads)
    join_grad_kv_tiles_kernel(const AttentionBackwardParams params, const __grid_constant__ GradKVMaps maps,
                              const RoundSchedule schedule, const GradientParts k_parts, const GradientParts v_parts) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  const int32_t shared_row = static_cast<int32_t>(blockIdx.x) * kJoinRows + warp();
  const auto [keys, block, stream, kv_head] =
      find_hopper_key_tile<Tile>(params, maps, schedule.whole_tiles + shared_row / Tile::kRows);
  const int row = shared_row % Tile::kRows - first_row(maps.keys, keys);
  if (row < 0 || row >= keys.count) return;
  const auto join = [&](const GradientParts& parts, const MutableHeads& tensor, bool values) {
    if (keys.in_past()) {
      const KeySource<T> source{params, stream, kv_head, values};
      parts.add_up(shared_row, [&](int channel, const float (&grads)[2]) {
        add_past_gradient(params, source, keys, row, channel, grads);
      });
    } else {
      parts.join(shared_row, head_rows<T>(tensor, stream, kv_head).at(keys.start + row));
    }
  };
  join(k_parts, params.grad_k, false);
  join(v_parts, params.grad_v, true);
}

// ---- The host's part

// One thread block for each multiprocessor, or for each item where there are fewer; then what joins the parts.
template <typename Tile, typename Maps, typename... Parts>
int32_t launch_rounds(void (*kernel)(AttentionBackwardParams, Maps, RoundSchedule, Parts...),
                      void (*join)(AttentionBackwardParams, Maps, RoundSchedule, Parts...),
                      const AttentionBackwardParams& params, const Maps& maps, const RoundSchedule& schedule,
                      const Parts&... parts) {
  static_assert(sizeof(HopperBackwardShared<Tile>) <= ptx::kMaxSharedBytesHopper);
  const int32_t error =
      ptx::launch(kernel, dim3(static_cast<unsigned>(schedule.blocks)), dim3(Tile::Block::kThreads),
                  sizeof(HopperBackwardShared<Tile>), params.stream, params, maps, schedule, parts...);
  if (error != 0) return error;
  return ptx::launch(join, dim3(static_cast<unsigned>(schedule.shared_rows(Tile::kRows) / kJoinRows)),
                     dim3(kJoinThreads), 0, params.stream, params, maps, schedule, parts...);
}

template <typename Tile>
GradientParts parts_of_rows(const AttentionBackwardParams& params, const RoundSchedule& schedule) {
  return {schedule.parts, params.head_dim, schedule.shared_rows(Tile::kRows), static_cast<float*>(params.workspace)};
}

template <typename T, int kHeadDim>
RoundSchedule schedule_grad_q(const AttentionBackwardParams& params) {
  using Tile = HopperGradQTile<T, kHeadDim>;
  return schedule_queries(params, Tile::kRows, Tile::kColumns);
}

template <typename Tile>
int32_t past_tiles_of_keys(const AttentionBackwardParams& params) {
  if (params.past_grads.k_pages == nullptr) return 0;
  return max_past_tiles<typename Tile::Rows>(params.past) * params.batch * params.num_kv_heads;
}

template <typename T, int kHeadDim>
RoundSchedule schedule_grad_kv(const AttentionBackwardParams& params) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  const int32_t own_tiles = static_cast<int32_t>(max_row_tiles(params.num_keys, params.query_spans, Tile::kRows));
  const int64_t query_tiles = (params.num_queries + Tile::kColumns - 1) / Tile::kColumns;
  return RoundSchedule(past_tiles_of_keys<Tile>(params) + own_tiles * params.batch * params.num_kv_heads,
                       query_tiles * (params.num_heads / params.num_kv_heads));
}

template <typename T, int kHeadDim>
int32_t launch_hopper_grad_q(const AttentionBackwardParams& params) {
  using Tile = HopperGradQTile<T, kHeadDim>;
  const RoundSchedule schedule = schedule_grad_q<T, kHeadDim>(params);
  if (schedule.items == 0) return 0;
  const auto queries = [&](ptx::TensorMap& map, const ConstHeads& heads) {
    return encode_heads<typename Tile::Rows>(map, heads, params.batch, params.num_queries, params.num_heads,
                                             params.head_dim);
  };
  GradQMaps maps{};
  int32_t error = queries(maps.q, params.q);
  if (error == 0) error = queries(maps.grad_out, params.grad_out);
  if (error == 0) error = encode_keys<typename Tile::Columns>(maps.keys, params);
  if (error != 0) return error;
  return launch_rounds<Tile>(hopper_grad_q_kernel<T, kHeadDim>, join_grad_q_tiles_kernel<T, kHeadDim>, params, maps,
                             schedule, parts_of_rows<Tile>(params, schedule));
}

template <typename T, int kHeadDim>
int32_t launch_hopper_grad_kv(const AttentionBackwardParams& params) {
  using Tile = HopperGradKVTile<T, kHeadDim>;
  const RoundSchedule schedule = schedule_grad_kv<T, kHeadDim>(params);
  if (schedule.items == 0) return 0;
  const auto queries = [&](ptx::TensorMap& map, const ConstHeads& heads) {
    return encode_heads<typename Tile::Columns>(map, heads, params.batch, params.num_queries, params.num_heads,
                                                params.head_dim);
  };
  GradKVMaps maps{};
  maps.past_tiles = past_tiles_of_keys<Tile>(params);
  int32_t error = encode_keys<typename Tile::Rows>(maps.keys, params);
  if (error == 0) error = queries(maps.q, params.q);
  if (error == 0) error = queries(maps.grad_out, params.grad_out);
  if (error != 0) return error;
  const GradientParts k_parts = parts_of_rows<Tile>(params, schedule);
  GradientParts v_parts = k_parts;
  v_parts.sums += k_parts.size();
  return launch_rounds<Tile>(hopper_grad_kv_kernel<T, kHeadDim>, join_grad_kv_tiles_kernel<T, kHeadDim>, params, maps,
                             schedule, k_parts, v_parts);
}

// The two kernels run one after the other, in the same workspace.
template <typename T, int kHeadDim>
int64_t hopper_backward_workspace_bytes(const AttentionBackwardParams& params) {
  return std::max(
      parts_of_rows<HopperGradQTile<T, kHeadDim>>(params, schedule_grad_q<T, kHeadDim>(params)).bytes(),
      2 * parts_of_rows<HopperGradKVTile<T, kHeadDim>>(params, schedule_grad_kv<T, kHeadDim>(params)).bytes());
}

// For calls that fits_hopper_backward.
template <typename T, int kHeadDim>
int32_t launch_hopper_backward(const AttentionBackwardParams& params) {
  int32_t error = launch_delta<T>(params);
  if (error == 0) error = launch_hopper_grad_q<T, kHeadDim>(params);
  if (error == 0) error = launch_hopper_grad_kv<T, kHeadDim>(params);
  return error;
}

}  // namespace selfforcing::attention_cuda
