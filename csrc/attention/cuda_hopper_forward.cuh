// out = softmax(scale q k^T) v on Hopper's own instructions, after FlashAttention-3 (arXiv 2407.08608).
//
// One warp, the producer, walks through the work and asks for copies of queries, keys and values, as far ahead as there
// are buffers. Warpgroups, the consumers, have 64 queries each and share keys and values. A consumer's product with the
// next keys and that with the values of the keys before run while it computes a softmax (section 3.2 there), and the
// consumers take turns in asking for products, so that one's softmax falls into the other's products (section 3.1).
//
// Where pages have to be decoded, all four warps of the producer's warpgroup do that (cuda_hopper_decode.cuh).
//
// The grid is as large as the GPU. Tiles of queries go to its thread blocks round after round, those of later blocks,
// which see more keys, first. What does not fill a last round is split over keys.
#pragma once
#include "cuda_hopper_decode.cuh"
#include "cuda_parts.cuh"
#include "cuda_schedule.cuh"

namespace selfforcing::attention_cuda {

template <typename T, int kHeadDim, bool kDecodes>
struct HopperForwardTile {
  using Block = HopperBlock<kHeadDim <= 64 && !kDecodes ? 3 : 2, kDecodes>;
  static constexpr int kConsumers = Block::kConsumers;
  static constexpr int kQueries = kConsumers * kWarpgroupRows;
  static constexpr int kKeys = kDecodes ? 96 : kHeadDim <= 64 ? 128 : 192;
  static constexpr int kStages = kDecodes || kHeadDim <= 64 ? 4 : 2;
  // Named barriers: the consumers' turns, all consumers, the producer.
  static constexpr int kConsumersBarrier = Turns<kConsumers>::kFirstBarrier + kConsumers;
  static constexpr int kProducerBarrier = kConsumersBarrier + 1;

  using Queries = HopperTile<T, kQueries, kHeadDim>;
  using Keys = HopperTile<T, kKeys, kHeadDim>;
};

// A tile of queries, or a part of its keys.
struct ForwardWork {
  int32_t row, count;  // the queries; no queries: the end
  int32_t stream, head;
  int32_t part;
  int32_t shared_tile;  // among those that are split over keys; negative: it is not
  bool sees_keys;
};

// What a consumer is told of a tile of keys.
struct alignas(16) ForwardKeys {
  int32_t first, end;  // the rows that are visible
  float bias_log2;
  int32_t last;  // of this work
};

template <typename T, int kHeadDim, bool kDecodes>
struct HopperForwardShared {
  using Tile = HopperForwardTile<T, kHeadDim, kDecodes>;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kKnownTiles = 2 * kStages;  // keys may be gone while values are read

  alignas(1024) unsigned char queries[Tile::Queries::kBytes];
  alignas(1024) unsigned char keys[kStages][Tile::Keys::kBytes], values[kStages][Tile::Keys::kBytes];
  BufferBarriers<1> query_barriers;
  BufferBarriers<kStages> key_barriers, value_barriers;
  ForwardWork work[2];  // of one tile of queries the consumers know until they have written it, the other is next
  ForwardKeys tiles[kKnownTiles];
};

struct ForwardMaps {
  ptx::TensorMap q;
  KeyMaps keys;
};

// The producer: all of its warps, each of which finds the same tiles. `filler` fills buffers with them.
template <typename T, int kHeadDim, bool kDecodes, typename Filler>
__device__ __forceinline__ void produce_forward(const AttentionParams& params, const ForwardMaps& maps,
                                                const RoundSchedule& schedule, Filler filler,
                                                HopperForwardShared<T, kHeadDim, kDecodes>& shared) {
  using Tile = HopperForwardTile<T, kHeadDim, kDecodes>;
  BufferPosition<1> queries;
  BufferPosition<Tile::kStages> keys;
  const bool leads = Tile::Block::leads();

  for (;; ++queries.use) {
    const int32_t item = item_of_round(static_cast<int32_t>(queries.use));
    const TilePart part = schedule.at(item);
    RowTile rows{0, 0, 0};
    if (item < schedule.items)
      rows = find_row_tile<Tile::kQueries, true>(params.spans, params.num_queries, part.tile,
                                                 params.batch * params.num_heads);
    if (leads) queries.wait_empty(shared.query_barriers);
    const ptx::SharedAddress queries_full = queries.full(shared.query_barriers);
    ForwardWork& work = shared.work[queries.use % 2];
    if (rows.count == 0) {
      if (leads && lane() == 0) {
        work.count = 0;
        ptx::barrier_arrive(queries_full);
      }
      return;
    }
    const int32_t stream = rows.copy / params.num_heads, head = rows.copy % params.num_heads;
    const int32_t kv_head = head / (params.num_heads / params.num_kv_heads);
    ColumnTiles<Tile::kKeys> tiles(params.spans, rows.block, params.num_keys);
    tiles.prepend(params.past, stream, kv_head);
    tiles.align_past(maps.keys.page_rows);
    tiles.take_every(part.parts, part.part);
    ColumnTile tile;
    bool more = tiles.next(tile);
    if (leads && lane() == 0) {
      work = {rows.start, rows.count, stream, head, part.part, part.shared_tile, more};
      if (more) {
        ptx::barrier_arrive_expect(queries_full, Tile::Queries::kBytes);
        typename Tile::Queries(shared.queries).load(maps.q, queries_full, 0, rows.start, head, stream);
      } else {
        ptx::barrier_arrive(queries_full);
      }
    }
    if (more) filler.start(stream, kv_head, tile);
    for (; more; ++keys.use) {
      const ColumnTile now = tile;
      more = tiles.next(tile);
      if (!more) tile = {0, 0, -1};
      filler.advance(tile);
      const int first = first_row(maps.keys, now);
      keys.wait_empty(shared.key_barriers);
      if (leads && lane() == 0)
        shared.tiles[keys.use % shared.kKnownTiles] = {
            first, first + now.count, KeySource<T>{params, stream, kv_head, false}.bias_log2(now), !more};
      filler.template fill<false>(typename Tile::Keys(shared.keys[keys.stage()]), keys.full(shared.key_barriers));
      keys.wait_empty(shared.value_barriers);
      filler.template fill<true>(typename Tile::Keys(shared.values[keys.stage()]), keys.full(shared.value_barriers));
    }
  }
}

// The softmax of a consumer's rows so far; a lane has two of them. In units of log2.
struct ConsumerSoftmax {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // over this lane's columns alone until the end

  // Turns scores into probabilities relative to the largest so far. What was summed relative to another has to be
  // multiplied by `correction`. scale_log2 > 0, and scores may have the other sign.
  template <int kSize>
  __device__ __forceinline__ void update(float (&scores)[kSize], const ForwardKeys& keys, bool negative,
                                         float scale_log2, float (&correction)[2]) {
    constexpr int kColumns = kSize / 4;  // in fragments of 8
    if (negative) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) scores[i] = -scores[i];
    }
    if (keys.first > 0 || keys.end < kColumns * kFragmentColumns) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const auto from_first = static_cast<unsigned>(column_in_fragments(i / 4, i % 2) - keys.first);
        if (from_first >= static_cast<unsigned>(keys.end - keys.first)) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most[2] = {-INFINITY, -INFINITY};  // two chains of comparisons
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) most[j] = fmaxf(most[j], scores[4 * n + 2 * i + j]);
      const float before = largest[i];
      largest[i] = fmaxf(before, fmaf(quad_max(fmaxf(most[0], most[1])), scale_log2, keys.bias_log2));
      correction[i] = ptx::fast_exp2(before - largest[i]);
      const float offset = keys.bias_log2 - largest[i];
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float (&x)[kSize] = scores;
        const int at = 4 * n + 2 * i;
        x[at] = ptx::fast_exp2(fmaf(x[at], scale_log2, offset));
        x[at + 1] = ptx::fast_exp2(fmaf(x[at + 1], scale_log2, offset));
        total += x[at] + x[at + 1];
      }
      sum[i] = fmaf(sum[i], correction[i], total);
    }
  }
};

// Writes a consumer's rows, from `first` on of a tile of kQueries, and their lse.
template <typename T, int kQueries, int kHeadDim>
__device__ __forceinline__ void store_forward(const AttentionParams& params, const KeySplit& split,
                                              const ForwardWork& work, int first, const ConsumerSoftmax& softmax,
                                              const float (&out)[kHeadDim / 2]) {
  const Rows<T> rows = head_rows<T>(params.out, work.stream, work.head);
  const int column = column_in_fragments(0, 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = quad_sum(softmax.sum[i]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse = sum == 0.0f ? -INFINITY : softmax.largest[i] * kLn2 + logf(sum);
    const int row = first + row_in_fragment(i);
    if (row >= work.count) continue;
    if (work.shared_tile < 0) {
      if (lane() % 4 == 0) params.lse[row_of_head(params, work.stream, work.head) + work.row + row] = lse;
      T* const to = rows.at(work.row + row) + column;
#pragma unroll
      for (int d = 0; d < kHeadDim / kFragmentColumns; ++d)
        if (d * kFragmentColumns < params.head_dim)
          *reinterpret_cast<unsigned*>(to + d * kFragmentColumns) =
              ptx::pack_pair<T>(out[4 * d + 2 * i] * inverse, out[4 * d + 2 * i + 1] * inverse);
    } else {
      const int64_t row_of_part = work.part * split.rows + static_cast<int64_t>(work.shared_tile) * kQueries + row;
      if (lane() % 4 == 0) split.lse[row_of_part] = lse;
      float* const to = split.out + row_of_part * params.head_dim + column;
#pragma unroll
      for (int d = 0; d < kHeadDim / kFragmentColumns; ++d)
        if (d * kFragmentColumns < params.head_dim)
          *reinterpret_cast<float2*>(to + d * kFragmentColumns) =
              float2{out[4 * d + 2 * i] * inverse, out[4 * d + 2 * i + 1] * inverse};
    }
  }
}

// A consumer: one warpgroup, number `group`.
template <typename T, int kHeadDim, bool kDecodes>
__device__ __forceinline__ void consume_forward(const AttentionParams& params, const KeySplit& split, int group,
                                                HopperForwardShared<T, kHeadDim, kDecodes>& shared) {
  using Tile = HopperForwardTile<T, kHeadDim, kDecodes>;
  const typename Tile::Queries q_tile(shared.queries);
  const float scale_log2 = fabsf(params.softmax_scale) * kLog2E;
  const Turns<Tile::kConsumers> turns(group);
  BufferPosition<1> queries;
  BufferPosition<Tile::kStages> keys, values;  // the newest keys; the values before those, or of the same tile
  const auto known = [&](unsigned use) -> const ForwardKeys& { return shared.tiles[use % shared.kKnownTiles]; };

  // Asks for the scores of the newest keys.
  const auto multiply_keys = [&](float (&scores)[Tile::kKeys / 2]) {
    multiply_transposed(scores, q_tile, group * kWarpgroupRows, typename Tile::Keys(shared.keys[keys.stage()]));
    ptx::warpgroup_commit();
  };
  const auto release_keys = [&] {
    keys.release(shared.key_barriers);
    if (known(keys.use).last) queries.release(shared.query_barriers);
  };
  // Waits for the values of the newest keys.
  const auto wait_for_values = [&] {
    const BufferPosition<Tile::kStages> newest{keys.use};
    newest.wait_full(shared.value_barriers);
    const int first = known(newest.use).first, end = known(newest.use).end;
    if (first == 0 && end == Tile::kKeys) return;
    clear_invisible(typename Tile::Keys(shared.values[newest.stage()]), first, end, Tile::Block::kConsumerThreads);
    ptx::named_barrier_sync(Tile::kConsumersBarrier, Tile::Block::kConsumerThreads);
  };
  const auto multiply_values = [&](float (&out)[kHeadDim / 2], const unsigned (&weights)[Tile::kKeys / 16][4]) {
    add_product(out, weights, typename Tile::Keys(shared.values[values.stage()]));
    ptx::warpgroup_commit();
  };

  for (;; ++queries.use) {
    queries.wait_full(shared.query_barriers);
    const ForwardWork& work = shared.work[queries.use % 2];
    if (work.count == 0) break;
    ConsumerSoftmax softmax;
    float out[kHeadDim / 2] = {};
    if (work.sees_keys) {
      float scores[Tile::kKeys / 2], correction[2];
      unsigned weights[Tile::kKeys / kFragmentDepth][4];
      keys.wait_full(shared.key_barriers);
      ptx::warpgroup_arrive(scores);
      multiply_keys(scores);
      ptx::warpgroup_wait<0>(scores);
      softmax.update(scores, known(keys.use), params.softmax_scale < 0.0f, scale_log2, correction);
      release_keys();
      round_sums<T>(weights, scores);
      wait_for_values();
      while (!known(keys.use++).last) {
        keys.wait_full(shared.key_barriers);
        turns.wait();
        ptx::warpgroup_arrive(scores, out);
        multiply_keys(scores);
        multiply_values(out, weights);
        turns.pass();
        ptx::warpgroup_wait<1>(scores);
        release_keys();
        softmax.update(scores, known(keys.use), params.softmax_scale < 0.0f, scale_log2, correction);
        wait_for_values();  // here it also keeps the compiler from waiting for products before the softmax
        ptx::warpgroup_wait<0>(out);
        values.release(shared.value_barriers);
        ++values.use;
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= correction[i / 2 % 2];
        round_sums<T>(weights, scores);
      }
      ptx::warpgroup_arrive(out);
      multiply_values(out, weights);
      ptx::warpgroup_wait<0>(out);
      values.release(shared.value_barriers);
      ++values.use;
    } else {
      queries.release(shared.query_barriers);
    }
    store_forward<T, Tile::kQueries, kHeadDim>(
        params, split, work, group * kWarpgroupRows + warp() % kWarpgroupWarps * kFragmentRows, softmax, out);
  }
  turns.finish();
}

// `kDecodes`: whether the past has_coded_pages.
template <typename T, int kHeadDim, bool kDecodes>
__global__ void __launch_bounds__(HopperForwardTile<T, kHeadDim, kDecodes>::Block::kThreads, kOneBlock)
    hopper_forward_kernel(const AttentionParams params, const __grid_constant__ ForwardMaps maps,
                          const RoundSchedule schedule, const KeySplit split) {
  using Tile = HopperForwardTile<T, kHeadDim, kDecodes>;
  SELFFORCING_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<HopperForwardShared<T, kHeadDim, kDecodes>*>(bytes);
  if (threadIdx.x == 0) {
    shared.query_barriers.init(Tile::Block::kConsumerWarps);
    shared.key_barriers.init(Tile::Block::kConsumerWarps);
    shared.value_barriers.init(Tile::Block::kConsumerWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const auto produce = [&](auto filler) { produce_forward(params, maps, schedule, filler, shared); };
  const auto decode = [&](auto format) {
    produce(TileDecoder<T, typename Tile::Keys, decltype(format)::value, Tile::kProducerBarrier>(params, maps.keys));
  };
  Tile::Block::run(
      [&] {
        if constexpr (kDecodes)
          with_format(params.past.format, decode);
        else
          produce(TileCopier<typename Tile::Keys>(params, maps.keys));
      },
      [&](int group) { consume_forward(params, split, group, shared); });
}

// Joins the parts of the tiles of kQueries that thread blocks shared: a warp for each row.
template <typename T, int kQueries>
__global__ void __launch_bounds__(kJoinThreads)
    join_tiles_kernel(const AttentionParams params, const RoundSchedule schedule, const KeySplit split) {
  const int32_t shared_row = static_cast<int32_t>(blockIdx.x) * kJoinRows + warp();
  const RowTile tile = find_row_tile<kQueries, true>(
      params.spans, params.num_queries, schedule.whole_tiles + shared_row / kQueries, params.batch * params.num_heads);
  if (shared_row % kQueries >= tile.count) return;
  const int32_t stream = tile.copy / params.num_heads, head = tile.copy % params.num_heads;
  const int32_t row = tile.start + shared_row % kQueries;
  join_parts(split, shared_row, params.head_dim, params.lse + row_of_head(params, stream, head) + row,
             head_rows<T>(params.out, stream, head).at(row));
}

// ---- The host's part

template <typename Tile>
RoundSchedule schedule_forward(const AttentionParams& params) {
  return schedule_queries(params, Tile::kQueries, Tile::kKeys);
}

// call(std::bool_constant<has_coded_pages>).
template <typename Call>
auto with_decoding(const AttentionParams& params, const Call& call) {
  return has_coded_pages(params.past) ? call(std::true_type{}) : call(std::false_type{});
}

template <typename T, int kHeadDim>
int64_t hopper_forward_workspace_bytes(const AttentionParams& params) {
  return with_decoding(params, [&](auto decodes) {
    using Tile = HopperForwardTile<T, kHeadDim, decodes.value>;
    const RoundSchedule schedule = schedule_forward<Tile>(params);
    return KeySplit::workspace_bytes(schedule.parts, schedule.shared_rows(Tile::kQueries), params.head_dim);
  });
}

template <typename T, int kHeadDim, bool kDecodes>
int32_t launch_hopper_forward(const AttentionParams& params) {
  using Tile = HopperForwardTile<T, kHeadDim, kDecodes>;
  using Shared = HopperForwardShared<T, kHeadDim, kDecodes>;
  static_assert(sizeof(Shared) <= ptx::kMaxSharedBytesHopper);
  const RoundSchedule schedule = schedule_forward<Tile>(params);
  if (schedule.items == 0) return 0;
  ForwardMaps maps{};
  int32_t error = encode_heads<typename Tile::Queries>(maps.q, params.q, params.batch, params.num_queries,
                                                       params.num_heads, params.head_dim);
  if (error == 0) error = encode_keys<typename Tile::Keys>(maps.keys, params);
  if (error != 0) return error;

  const int64_t rows = schedule.shared_rows(Tile::kQueries);
  const KeySplit split(schedule.parts, rows, params.head_dim, params.workspace);
  error = ptx::launch(hopper_forward_kernel<T, kHeadDim, kDecodes>, dim3(static_cast<unsigned>(schedule.blocks)),
                      dim3(Tile::Block::kThreads), sizeof(Shared), params.stream, params, maps, schedule, split);
  if (error != 0 || schedule.parts == 1) return error;
  return ptx::launch(join_tiles_kernel<T, Tile::kQueries>, dim3(static_cast<unsigned>(rows / kJoinRows)),
                     dim3(kJoinThreads), 0, params.stream, params, schedule, split);
}

// For calls that fits_hopper_forward.
template <typename T, int kHeadDim>
int32_t launch_hopper_forward(const AttentionParams& params) {
  return with_decoding(params, [&](auto decodes) { return launch_hopper_forward<T, kHeadDim, decodes.value>(params); });
}

}  // namespace selfforcing::attention_cuda
