// The backward pass: tiles of keys outside, chunks of queries inside. With scores transposed as in the forward pass,
// probabilities and gradients of scores are operands of the products for grad_v and grad_k as they are.
//
// One thread holds the gradients of a tile of keys. Gradients of queries are summed over tiles in memory, a chunk at a
// time and always in the order of the tiles, whichever thread computes them: the sum has the same bits for any number
// of threads.
#pragma once
#include <sched.h>

#include "cpu_layout.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

inline constexpr int kBackwardTileKeys = 128;
inline constexpr int kBackwardChunkLanes = 512;
// With this many heads per thread each is done by one thread from start to end; with fewer, threads share heads.
inline constexpr int kWholeHeadsPerThread = 8;
// What packed queries may take; heads beyond that wait for their turn.
inline constexpr int64_t kMostPackedBytes = int64_t{256} << 20;

// Neighbouring panels, up to kBackwardChunkLanes.
struct QueryChunk {
  int32_t first_panel, num_panels;
  int32_t lane, lanes;
  int32_t first_query, end_query;
};

// Keys [key, key + count) of k and v, all of one block of query_spans.
struct KeyTile {
  int32_t block, key, count;
};

// Packed queries of one head.
struct HeadBuffers {
  float *queries, *grads;         // per panel words [word][lane], of q and grad_out
  float *query_rows, *grad_rows;  // words [lane / kPack][d], joined over neighbouring lanes
  float* grad_q;                  // [lane][d]: sums, softmax_scale not applied
  float *lse, *delta;             // [lane]: lse; rowsum(out * grad_out) - grad_lse
  int32_t* tiles_done;            // [chunk]: 1 + the last tile whose part is in grad_q
};

// Packed keys of a tile, in the workspace of its worker.
struct TileBuffers {
  float *key_rows, *value_rows;        // words [key][word]
  float* keys_joined;                  // words [key / kPack][d], joined over neighbouring keys
  float *grad_k, *grad_v;              // [key][d]: sums
  float *probabilities, *grad_scores;  // words [key][lane / kPack] of the chunk
  float* grad_scores_joined;           // words [key / kPack][lane]; grad_scores itself where kPack is 1
};

struct BackwardPlan {
  Panel* panels = nullptr;
  QueryChunk* chunks = nullptr;
  KeyTile* tiles = nullptr;
  int32_t num_panels = 0, num_chunks = 0, num_tiles = 0;
  int32_t past_tiles = 0;                   // of the stream that has most
  int32_t lanes = 0;                        // of all panels
  int32_t row_words = 0, joined_words = 0;  // length of a row of probabilities, of joined gradients
  bool whole_heads = false;
  int32_t slots = 0;  // K/V heads whose queries are packed at a time
  char *slot_memory = nullptr, *workers = nullptr;
  int64_t slot_bytes = 0, worker_bytes = 0, bytes = 0;
};

template <typename Op>
HeadBuffers take_head_buffers(Arena& arena, const BackwardPlan& plan, int dim) {
  const int64_t words = static_cast<int64_t>(plan.lanes) * (dim / Op::kPack), padded_dim = round_up(dim, kLanes);
  HeadBuffers head;
  head.queries = arena.take<float>(words);
  head.grads = arena.take<float>(words);
  head.query_rows = arena.take<float>(plan.lanes / Op::kPack * padded_dim);
  head.grad_rows = arena.take<float>(plan.lanes / Op::kPack * padded_dim);
  head.grad_q = arena.take<float>(plan.lanes * padded_dim);
  head.lse = arena.take<float>(plan.lanes);
  head.delta = arena.take<float>(plan.lanes);
  head.tiles_done = arena.take<int32_t>(plan.num_chunks);
  return head;
}

template <typename Op>
HeadBuffers head_in_slot(const BackwardPlan& plan, int slot, int head_in_group, int dim) {
  Arena arena(plan.slot_memory + slot * plan.slot_bytes);
  HeadBuffers head = take_head_buffers<Op>(arena, plan, dim);
  for (; head_in_group > 0; --head_in_group) head = take_head_buffers<Op>(arena, plan, dim);
  return head;
}

template <typename Op>
TileBuffers take_tile_buffers(Arena& arena, const BackwardPlan& plan, int dim) {
  constexpr int64_t kKeys = kBackwardTileKeys;
  const int words = dim / Op::kPack, padded_dim = round_up(dim, kLanes);
  TileBuffers tile;
  tile.key_rows = arena.take<float>(kKeys * words);
  tile.value_rows = arena.take<float>(kKeys * words);
  tile.keys_joined = arena.take<float>(kKeys / Op::kPack * padded_dim);
  tile.grad_k = arena.take<float>(kKeys * padded_dim);
  tile.grad_v = arena.take<float>(kKeys * padded_dim);
  tile.probabilities = arena.take<float>(kKeys * plan.row_words);
  tile.grad_scores = arena.take<float>(kKeys * plan.row_words);
  tile.grad_scores_joined =
      Op::kPack == 1 ? tile.grad_scores : arena.take<float>(kKeys / Op::kPack * plan.joined_words);
  return tile;
}

template <typename Visit>
void for_each_chunk(const SpanTable& spans, const Visit& visit) {
  QueryChunk chunk{};
  for_each_panel(spans, [&](const Panel& panel, int) {
    if (chunk.lanes + panel.vectors * kLanes > kBackwardChunkLanes) {
      visit(chunk);
      chunk = {chunk.first_panel + chunk.num_panels, 0, panel.lane, 0, panel.query, panel.query};
    }
    ++chunk.num_panels;
    chunk.lanes += panel.vectors * kLanes;
    chunk.end_query = panel.query + panel.count;
  });
  if (chunk.num_panels > 0) visit(chunk);
}

template <typename Visit>
void for_each_key_tile(const SpanTable& query_spans, const Visit& visit) {
  for (int block = 0; block < query_spans.num_blocks; ++block) {
    const int start = query_spans.block_starts[block], end = query_spans.block_starts[block + 1];
    const int size = tile_size(end - start, kBackwardTileKeys);
    for (int key = start; key < end; key += size) visit(KeyTile{block, key, end - key < size ? end - key : size});
  }
}

template <typename Op>
BackwardPlan plan_backward(const AttentionBackwardParams& p) {
  BackwardPlan plan;
  int most_lanes = 0;
  for_each_panel(p.spans, [&](const Panel& panel, int) {
    ++plan.num_panels;
    plan.lanes = panel.lane + panel.vectors * kLanes;
  });
  for_each_chunk(p.spans, [&](const QueryChunk& chunk) {
    ++plan.num_chunks;
    most_lanes = chunk.lanes > most_lanes ? chunk.lanes : most_lanes;
  });
  for_each_key_tile(p.query_spans, [&](const KeyTile&) { ++plan.num_tiles; });
  for (int batch = 0; batch < p.batch; ++batch) {
    const int64_t past = VisibleKeys<Op>(p, batch, 0, -1).count();
    const int tiles = static_cast<int>((past + kBackwardTileKeys - 1) / kBackwardTileKeys);
    plan.past_tiles = tiles > plan.past_tiles ? tiles : plan.past_tiles;
  }
  // A vector more than needed, so that rows do not all fall on the same few sets of the cache.
  plan.row_words = most_lanes / Op::kPack + kLanes;
  plan.joined_words = most_lanes + kLanes;

  Arena arena(p.workspace);
  plan.panels = arena.take<Panel>(plan.num_panels);
  plan.chunks = arena.take<QueryChunk>(plan.num_chunks);
  plan.tiles = arena.take<KeyTile>(plan.num_tiles);
  if (p.workspace != nullptr) {
    int panel = 0, chunk = 0, tile = 0;
    for_each_panel(p.spans, [&](const Panel& value, int) { plan.panels[panel++] = value; });
    for_each_chunk(p.spans, [&](const QueryChunk& value) { plan.chunks[chunk++] = value; });
    for_each_key_tile(p.query_spans, [&](const KeyTile& value) { plan.tiles[tile++] = value; });
  }

  Arena one_slot(nullptr), one_worker(nullptr);
  for (int head = 0; head < p.num_heads / p.num_kv_heads; ++head) take_head_buffers<Op>(one_slot, plan, p.head_dim);
  take_tile_buffers<Op>(one_worker, plan, p.head_dim);
  plan.slot_bytes = one_slot.used();
  plan.worker_bytes = one_worker.used();

  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads, threads = p.parallel.num_threads;
  int64_t slots = heads < threads ? heads : threads;
  if (slots * plan.slot_bytes > kMostPackedBytes) slots = kMostPackedBytes / plan.slot_bytes;
  plan.slots = slots < 1 ? 1 : static_cast<int32_t>(slots);
  plan.whole_heads = plan.slots == threads && (threads == 1 || heads >= kWholeHeadsPerThread * threads);
  plan.slot_memory = arena.take<char>(plan.slot_bytes * plan.slots);
  plan.workers = arena.take<char>(plan.worker_bytes * threads);
  plan.bytes = arena.used();
  return plan;
}

// ---- Queries

// delta of kLanes rows; those from `count` on are 0.
template <typename Op>
Floats row_products(Row<Op> a, int64_t a_stride, Row<Op> b, int64_t b_stride, int count, int dim) {
  Floats products[kLanes] = {};
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < dim; d += kLanes) {
      const int columns = dim - d < kLanes ? dim - d : kLanes;
      products[i] = multiply_add(load<typename Op::Element>(a + i * a_stride + d, columns),
                                 load<typename Op::Element>(b + i * b_stride + d, columns), products[i]);
    }
  transpose(products);
  Floats sum{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sum += products[i];
  return sum;
}

// Rows of queries as words [lane / kPack][d]; rows from `count` to `lanes` are 0.
template <typename Op>
void pack_joined(float* to, Row<Op> rows, int64_t stride, int count, int lanes, int dim) {
  alignas(64) static constexpr typename Op::Storage kZeros[256] = {};
  const int padded_dim = round_up(dim, kLanes);
  for (int lane = 0; lane < lanes; lane += Op::kPack) {
    Row<Op> joined[Op::kPack];
    for (int i = 0; i < Op::kPack; ++i) joined[i] = lane + i < count ? rows + (lane + i) * stride : kZeros;
    Op::join_rows(joined, dim, [&](int d, Floats words) { store(to + lane / Op::kPack * padded_dim + d, words); });
  }
}

template <typename Op>
void pack_chunk(const AttentionBackwardParams& p, const BackwardPlan& plan, int chunk_index, int batch, int head,
                const HeadBuffers& to) {
  const QueryChunk& chunk = plan.chunks[chunk_index];
  const int dim = p.head_dim, words = dim / Op::kPack, padded_dim = round_up(dim, kLanes);
  to.tiles_done[chunk_index] = 0;
  memset(to.grad_q + static_cast<int64_t>(chunk.lane) * padded_dim, 0,
         static_cast<size_t>(chunk.lanes) * padded_dim * sizeof(float));
  for (int i = chunk.first_panel; i < chunk.first_panel + chunk.num_panels; ++i) {
    const Panel& panel = plan.panels[i];
    const int64_t lane = panel.lane;
    const Row<Op> q = row_of<Op>(p.q, batch, head, panel.query),
                  grad = row_of<Op>(p.grad_out, batch, head, panel.query);
    const Row<Op> out = row_of<Op>(p.out, batch, head, panel.query);
    pack_lanes<Op>(to.queries + lane * words, panel.vectors, q, p.q.token_stride, panel.count, dim, 0);
    pack_lanes<Op>(to.grads + lane * words, panel.vectors, grad, p.grad_out.token_stride, panel.count, dim, 0);
    pack_joined<Op>(to.query_rows + lane / Op::kPack * padded_dim, q, p.q.token_stride, panel.count,
                    panel.vectors * kLanes, dim);
    pack_joined<Op>(to.grad_rows + lane / Op::kPack * padded_dim, grad, p.grad_out.token_stride, panel.count,
                    panel.vectors * kLanes, dim);
    const int64_t row = (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + panel.query;
    for (int first = 0; first < panel.vectors * kLanes; first += kLanes) {
      const int count = panel.count - first < kLanes ? panel.count - first : kLanes;
      Floats delta = row_products<Op>(out + first * p.out.token_stride, p.out.token_stride,
                                      grad + first * p.grad_out.token_stride, p.grad_out.token_stride, count, dim);
      if (p.grad_lse != nullptr) delta -= load<Float32>(p.grad_lse + row + first, count);
      store(to.delta + lane + first, delta);
      store(to.lse + lane + first, load<Float32>(p.lse + row + first, count));
      // Padding has probability 0.
      for (int i = count; i < kLanes; ++i) to.lse[lane + first + i] = 1e30f;
    }
  }
}

template <typename Op>
void write_grad_q(const AttentionBackwardParams& p, const BackwardPlan& plan, const QueryChunk& chunk, int batch,
                  int head, const HeadBuffers& from) {
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes);
  for (int i = chunk.first_panel; i < chunk.first_panel + chunk.num_panels; ++i) {
    const Panel& panel = plan.panels[i];
    for (int query = 0; query < panel.count; ++query) {
      auto* to = row_of<Op>(p.grad_q, batch, head, panel.query + query);
      const float* sums = from.grad_q + static_cast<int64_t>(panel.lane + query) * padded_dim;
      for (int d = 0; d < dim; d += kLanes)
        store<typename Op::Element>(to + d, load(sums + d) * p.softmax_scale, dim - d < kLanes ? dim - d : kLanes);
    }
  }
}

// ---- Keys

template <typename Op>
void pack_keys(VisibleKeys<Op>* past, KeyRun<Op> run, int count, int dim, const TileBuffers& to) {
  alignas(64) static constexpr typename Op::Storage kZeros[256] = {};
  const int words = dim / Op::kPack, padded_dim = round_up(dim, kLanes), padded = round_up(count, kKeyMultiple);
  Row<Op> joined[Op::kPack] = {};
  for (int key = 0, in_run = 0; key < padded; ++key, ++in_run) {
    if (past != nullptr && key < count && (key == 0 || in_run == run.count)) {
      run = past->next(count - key);
      in_run = 0;
    }
    const Row<Op> k = key < count ? run.k + in_run * run.k_stride : kZeros;
    const Row<Op> v = key < count ? run.v + in_run * run.v_stride : kZeros;
    prefetch_row<Op>(k + kPrefetchRows * run.k_stride, dim);
    prefetch_row<Op>(v + kPrefetchRows * run.v_stride, dim);
    pack_row<Op>(to.key_rows + key * words, k, dim);
    pack_row<Op>(to.value_rows + key * words, v, dim);
    joined[key % Op::kPack] = k;
    if (key % Op::kPack == Op::kPack - 1)
      Op::join_rows(joined, dim,
                    [&](int d, Floats value) { store(to.keys_joined + key / Op::kPack * padded_dim + d, value); });
  }
}

// Probabilities and gradients of scores of one panel against `count` keys; the panel's lanes start at `offset` of a
// row.
template <typename Op, int kVectors>
__attribute__((noinline)) void grade_panel(const TileBuffers& tile, const BackwardPlan& plan, const HeadBuffers& head,
                                           int64_t lane, int offset, int count, int dim, float softmax_scale) {
  constexpr int kWidth = kVectors * kLanes;
  const int words = dim / Op::kPack, padded = round_up(count, kKeyMultiple);
  for (int key = 0; key < padded; key += kTileRows) {
    const int rows = count - key;  // of this tile; those beyond are padding
    alignas(64) float weights[kTileRows * kWidth];
    {
      Floats scores[kTileRows][kVectors] = {};
      multiply<Op>(scores, tile.key_rows + key * words, words, 1, head.queries + lane * words, kWidth, words);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const Floats lse = load(head.lse + lane + j * kLanes), scales = broadcast(softmax_scale);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
          // The difference first, then the unit of log2: large probabilities have small differences.
          Floats weight = exp2(multiply_subtract(scores[i][j], scales, lse) * kLog2E, Op::kExp2);
          if (i >= rows) weight = Floats{};
          store(weights + i * kWidth + j * kLanes, weight);
          Op::store_summed(tile.probabilities + (key + i) * plan.row_words + (offset + j * kLanes) / Op::kPack, weight);
        }
      }
    }
    Floats grads[kTileRows][kVectors] = {};
    multiply<Op>(grads, tile.value_rows + key * words, words, 1, head.grads + lane * words, kWidth, words);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const Floats delta = load(head.delta + lane + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        grads[i][j] = load(weights + i * kWidth + j * kLanes) * (grads[i][j] - delta);
        Op::store_summed(tile.grad_scores + (key + i) * plan.row_words + (offset + j * kLanes) / Op::kPack,
                         grads[i][j]);
        if constexpr (Op::kPack == 2) {
          if (i % 2 == 1)
            store(tile.grad_scores_joined + (key + i) / 2 * plan.joined_words + offset + j * kLanes,
                  Op::join({grads[i - 1][j], grads[i][j]}));
        }
      }
    }
  }
}

template <typename Op, int kRows, int kVectors>
SELFFORCING_INLINE void accumulate_columns(float* sums, int64_t sums_row, int rows, const float* a, int64_t a_row,
                                           int64_t a_step, const float* b, int64_t b_step, int steps) {
  for (int row = 0; row < rows; row += kRows) {
    Floats tile[kRows][kVectors] = {};
    multiply<Op>(tile, a + row * a_row, a_row, a_step, b, b_step, steps);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* sum = sums + (row + i) * sums_row + j * kLanes;
        store(sum, load(sum) + tile[i][j]);
      }
  }
}

// sums[row][d] += sum over steps of a[row * a_row + step * a_step] * b[step][d]; rows of sums and b have `length`
// words, a multiple of kLanes; `rows` is a multiple of kKeyMultiple.
template <typename Op>
__attribute__((noinline)) void accumulate(float* sums, int length, int rows, const float* a, int64_t a_row,
                                          int64_t a_step, const float* b, int steps) {
  constexpr int kWide = kTileRows == 8 ? 4 : 2;  // 4 x 4 accumulators, or 4 x 2 of 16 registers
  int d = 0;
  for (; length - d >= kWide * kLanes; d += kWide * kLanes)
    accumulate_columns<Op, 4, kWide>(sums + d, length, rows, a, a_row, a_step, b + d, length, steps);
  switch ((length - d) / kLanes) {
    case 3: return accumulate_columns<Op, 4, 3>(sums + d, length, rows, a, a_row, a_step, b + d, length, steps);
    case 2: return accumulate_columns<Op, 8, 2>(sums + d, length, rows, a, a_row, a_step, b + d, length, steps);
    case 1: return accumulate_columns<Op, 8, 1>(sums + d, length, rows, a, a_row, a_step, b + d, length, steps);
  }
}

template <typename Op>
void write_grad_keys(const MutableHeads& to, int batch, int kv_head, const KeyTile& keys, const float* sums,
                     float factor, int dim) {
  const int padded_dim = round_up(dim, kLanes);
  for (int i = 0; i < keys.count; ++i) {
    auto* row = row_of<Op>(to, batch, kv_head, keys.key + i);
    for (int d = 0; d < dim; d += kLanes)
      store<typename Op::Element>(row + d, load(sums + i * padded_dim + d) * factor,
                                  dim - d < kLanes ? dim - d : kLanes);
  }
}

// ---- One tile of keys against all queries that see it

inline bool sees(const AttentionBackwardParams& p, const KeyTile& keys, const QueryChunk& chunk) {
  for (int i = p.query_spans.span_offsets[keys.block]; i < p.query_spans.span_offsets[keys.block + 1]; ++i)
    if (p.query_spans.spans[2 * i] < chunk.end_query && chunk.first_query < p.query_spans.spans[2 * i + 1]) return true;
  return false;
}

// Waits until the tiles before `tile` that add to a chunk have done so. They are being computed: items are handed out
// in the order of the tiles.
inline void await_turn(const AttentionBackwardParams& p, const BackwardPlan& plan, int past_tiles, int tile, int chunk,
                       const int32_t* done) {
  int before = tile - 1;  // the last tile before this one that adds to the chunk; every tile of the past does
  while (before >= past_tiles && !sees(p, plan.tiles[before - past_tiles], plan.chunks[chunk])) --before;
  for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != before + 1; ++spins)
    if (spins > 1000) sched_yield();
}

// The part of a chunk whose queries lie in [first_query, end_query) against the packed tile.
template <typename Op, typename AwaitTurn>
void grade_queries(const AttentionBackwardParams& p, const BackwardPlan& plan, const QueryChunk& chunk, int first_query,
                   int end_query, const HeadBuffers& head, const TileBuffers& tile, int count, bool past,
                   const AwaitTurn& await) {
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes), padded = round_up(count, kKeyMultiple);
  int64_t lane = -1;
  int lanes = 0;
  for (int i = chunk.first_panel; i < chunk.first_panel + chunk.num_panels; ++i) {
    const Panel& panel = plan.panels[i];
    if (panel.query < first_query || panel.query >= end_query) continue;
    if (lane < 0) lane = panel.lane;
    with_vectors(panel.vectors, [&](auto vectors) {
      grade_panel<Op, decltype(vectors)::kValue>(tile, plan, head, panel.lane, lanes, count, dim, p.softmax_scale);
    });
    lanes += panel.vectors * kLanes;
  }
  if (!past) {
    const int64_t summed = lane / Op::kPack * padded_dim;
    accumulate<Op>(tile.grad_v, padded_dim, padded, tile.probabilities, plan.row_words, 1, head.grad_rows + summed,
                   lanes / Op::kPack);
    accumulate<Op>(tile.grad_k, padded_dim, padded, tile.grad_scores, plan.row_words, 1, head.query_rows + summed,
                   lanes / Op::kPack);
  }
  await();
  accumulate<Op>(head.grad_q + lane * padded_dim, padded_dim, lanes, tile.grad_scores_joined, 1,
                 Op::kPack == 1 ? plan.row_words : plan.joined_words, tile.keys_joined, padded / Op::kPack);
}

// `index` counts the tiles of the past first. `in_turn`: other threads work on the same head.
template <typename Op>
void grade_tile(const AttentionBackwardParams& p, const BackwardPlan& plan, int slot, int batch, int kv_head, int index,
                bool in_turn, const TileBuffers& tile) {
  VisibleKeys<Op> visible_past(p, batch, kv_head, -1);
  const int64_t past_keys = visible_past.count();
  const int past_size = tile_size(past_keys, kBackwardTileKeys);
  const int past_tiles = past_size == 0 ? 0 : static_cast<int>((past_keys + past_size - 1) / past_size);
  if (index >= past_tiles + plan.num_tiles) return;  // another stream has a longer past
  const bool past = index < past_tiles;
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes), group = p.num_heads / p.num_kv_heads;
  KeyTile keys{};
  const int32_t everything[2] = {0, p.num_queries};
  const int32_t* spans = everything;
  int num_spans = 1;
  if (past) {
    visible_past.skip(index * past_size);
    const int64_t left = past_keys - static_cast<int64_t>(index) * past_size;
    keys.count = left < past_size ? static_cast<int>(left) : past_size;
    pack_keys<Op>(&visible_past, {}, keys.count, dim, tile);
  } else {
    keys = plan.tiles[index - past_tiles];
    const int32_t* offsets = p.query_spans.span_offsets + keys.block;
    spans = p.query_spans.spans + static_cast<int64_t>(offsets[0]) * 2;
    num_spans = offsets[1] - offsets[0];
    if (num_spans > 0)
      pack_keys<Op>(nullptr,
                    {row_of<Op>(p.k, batch, kv_head, keys.key), row_of<Op>(p.v, batch, kv_head, keys.key),
                     p.k.token_stride, p.v.token_stride, keys.count},
                    keys.count, dim, tile);
    const size_t bytes = static_cast<size_t>(round_up(keys.count, kKeyMultiple)) * padded_dim * sizeof(float);
    memset(tile.grad_k, 0, bytes);
    memset(tile.grad_v, 0, bytes);
  }
  for (int i = 0; i < group; ++i) {
    const HeadBuffers head = head_in_slot<Op>(plan, slot, i, dim);
    for (int c = 0; c < plan.num_chunks; ++c) {
      const QueryChunk& chunk = plan.chunks[c];
      bool added = false;
      for (int span = 0; span < num_spans; ++span) {
        if (spans[2 * span] >= chunk.end_query || chunk.first_query >= spans[2 * span + 1]) continue;
        grade_queries<Op>(p, plan, chunk, spans[2 * span], spans[2 * span + 1], head, tile, keys.count, past, [&] {
          if (in_turn && !added) await_turn(p, plan, past_tiles, index, c, head.tiles_done + c);
        });
        added = true;
      }
      if (in_turn && added) __atomic_store_n(head.tiles_done + c, index + 1, __ATOMIC_RELEASE);
    }
  }
  if (past) return;
  write_grad_keys<Op>(p.grad_k, batch, kv_head, keys, tile.grad_k, p.softmax_scale, dim);
  write_grad_keys<Op>(p.grad_v, batch, kv_head, keys, tile.grad_v, 1, dim);
}

template <typename Op>
void backward(const AttentionBackwardParams& p) {
  const BackwardPlan plan = plan_backward<Op>(p);
  const int group = p.num_heads / p.num_kv_heads, tiles = plan.past_tiles + plan.num_tiles;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const auto pack = [&](int slot, int64_t kv_head, int in_group, int chunk) {
    const int batch = static_cast<int>(kv_head / p.num_kv_heads);
    const int head = static_cast<int>(kv_head % p.num_kv_heads) * group + in_group;
    pack_chunk<Op>(p, plan, chunk, batch, head, head_in_slot<Op>(plan, slot, in_group, p.head_dim));
  };
  const auto grade = [&](int slot, int64_t kv_head, int tile, bool in_turn, int32_t worker) {
    Arena arena(plan.workers + worker * plan.worker_bytes);
    grade_tile<Op>(p, plan, slot, static_cast<int>(kv_head / p.num_kv_heads),
                   static_cast<int>(kv_head % p.num_kv_heads), tile, in_turn,
                   take_tile_buffers<Op>(arena, plan, p.head_dim));
  };
  const auto write = [&](int slot, int64_t kv_head, int in_group, int chunk) {
    const int batch = static_cast<int>(kv_head / p.num_kv_heads);
    const int head = static_cast<int>(kv_head % p.num_kv_heads) * group + in_group;
    write_grad_q<Op>(p, plan, plan.chunks[chunk], batch, head, head_in_slot<Op>(plan, slot, in_group, p.head_dim));
  };

  if (plan.whole_heads) {
    p.parallel.for_each(heads, [&](int64_t kv_head, int32_t worker) {
      for (int i = 0; i < group; ++i)
        for (int chunk = 0; chunk < plan.num_chunks; ++chunk) pack(worker, kv_head, i, chunk);
      for (int tile = 0; tile < tiles; ++tile) grade(worker, kv_head, tile, false, worker);
      for (int i = 0; i < group; ++i)
        for (int chunk = 0; chunk < plan.num_chunks; ++chunk) write(worker, kv_head, i, chunk);
    });
    return;
  }
  for (int64_t first = 0; first < heads; first += plan.slots) {
    const int64_t slots = heads - first < plan.slots ? heads - first : plan.slots;
    const int64_t chunks = slots * group * plan.num_chunks;
    const auto for_each_query_chunk = [&](const auto& work) {
      p.parallel.for_each(chunks, [&](int64_t item, int32_t) {
        const int64_t head = item / plan.num_chunks;
        work(static_cast<int>(head / group), first + head / group, static_cast<int>(head % group),
             static_cast<int>(item % plan.num_chunks));
      });
    };
    for_each_query_chunk(pack);
    p.parallel.for_each(slots * tiles, [&](int64_t item, int32_t worker) {
      const int slot = static_cast<int>(item % slots);
      grade(slot, first + slot, static_cast<int>(item / slots), true, worker);
    });
    for_each_query_chunk(write);
  }
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
