// Plan and packing of the backward pass: chunks of queries, tiles of keys, and their operands in the workspace.
#pragma once
#include "cpu_past.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

inline constexpr int kBackwardTileKeys = 128;
inline constexpr int kBackwardChunkLanes = 512;
// With this many heads per thread each is done by one thread from start to end; with fewer, threads share heads.
inline constexpr int kWholeHeadsPerThread = 8;
// Heads of so few operations, too, if they are shared out evenly: threads that meet often cost more than one that
// waits.
inline constexpr double kSmallHeadOperations = 1e8;
// What packed queries may take; heads beyond that wait for their turn. So little they may take in any case.
inline constexpr int64_t kMostPackedBytes = int64_t{256} << 20, kFewPackedBytes = int64_t{1} << 20;
// A tile that is made smaller, so that parts of the keys have equally many, has no fewer keys than this.
inline constexpr int kBackwardLeastKeys = 64;
inline constexpr int64_t kAllKeys = int64_t{1} << 62;

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
  float* grad_q;                  // [part of the keys][lane][d]: sums, softmax_scale not applied
  float *lse, *delta;             // [lane]: lse; rowsum(out * grad_out) - grad_lse
  int32_t* tiles_done;            // [part of the keys][chunk]: 1 + the last tile that is in grad_q
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
  int32_t* kv_heads = nullptr;  // of all streams, in the order in which they are taken up
  float* turns = nullptr;       // the table of Turns
  int32_t num_panels = 0, num_chunks = 0, num_tiles = 0;
  int32_t past_tiles = 0;                   // of the K/V head that has most
  int32_t lanes = 0;                        // of all panels
  int32_t row_words = 0, joined_words = 0;  // length of a row of probabilities, of joined gradients
  bool whole_heads = false;
  int32_t slots = 0;      // K/V heads whose queries are packed at a time
  int32_t key_parts = 1;  // of a head, each with its own sums for the gradient of q
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
  head.grad_q = arena.take<float>(plan.key_parts * plan.lanes * padded_dim);
  head.lse = arena.take<float>(plan.lanes);
  head.delta = arena.take<float>(plan.lanes);
  head.tiles_done = arena.take<int32_t>(static_cast<int64_t>(plan.key_parts) * plan.num_chunks);
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
  tile.key_rows = arena.take<float>(kKeys * words + kLanes);
  tile.value_rows = arena.take<float>(kKeys * words + kLanes);
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

// The keys of a block in as few tiles as possible, or, if there is one block only, a multiple of key_parts.
template <typename Visit>
void for_each_key_tile(const SpanTable& query_spans, int key_parts, const Visit& visit) {
  for (int block = 0; block < query_spans.num_blocks; ++block) {
    const int start = query_spans.block_starts[block], end = query_spans.block_starts[block + 1];
    const int64_t steps = (end - start + kKeyMultiple - 1) / kKeyMultiple;
    int64_t tiles = (end - start + kBackwardTileKeys - 1) / kBackwardTileKeys;
    const int64_t even = (tiles + key_parts - 1) / key_parts * key_parts;
    if (query_spans.num_blocks == 1 && even * kBackwardLeastKeys <= end - start) tiles = even;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int key = start + static_cast<int>(steps * tile / tiles) * kKeyMultiple;
      const int next = start + static_cast<int>(steps * (tile + 1) / tiles) * kKeyMultiple;
      visit(KeyTile{block, key, (next < end ? next : end) - key});
    }
  }
}

// The past in as few tiles as possible, each of one bias.
inline int num_past_tiles(const AttentionParams& p, int batch, int kv_head) {
  KeyWalk past(p, batch, kv_head, -1);
  int64_t tiles = 0;
  for (KeyStretch keys = past.stretch(kAllKeys); keys.count > 0; keys = past.stretch(kAllKeys)) {
    tiles += (keys.count + kBackwardTileKeys - 1) / kBackwardTileKeys;
    past.skip(keys.count);
  }
  return static_cast<int>(tiles);
}

// Goes on to tile `index` of the past, and says what it holds.
inline KeyStretch go_to_tile(KeyWalk& past, int64_t index) {
  KeyStretch keys = past.stretch(kAllKeys);
  for (int64_t tiles; index >= (tiles = (keys.count + kBackwardTileKeys - 1) / kBackwardTileKeys); index -= tiles) {
    past.skip(keys.count);
    keys = past.stretch(kAllKeys);
  }
  const int64_t size = tile_size(keys.count, kBackwardTileKeys), first = index * size;
  past.skip(first);
  return {keys.count - first < size ? keys.count - first : size, keys.bias};
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
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads, threads = p.parallel.num_threads;
  plan.key_parts = heads > 0 && heads < threads ? static_cast<int32_t>(threads / heads) : 1;
  for_each_key_tile(p.query_spans, plan.key_parts, [&](const KeyTile&) { ++plan.num_tiles; });
  for (int batch = 0; batch < p.batch; ++batch)
    for (int list = 0; list < p.past.span_lists; ++list) {
      const int tiles = num_past_tiles(p, batch, list);
      plan.past_tiles = tiles > plan.past_tiles ? tiles : plan.past_tiles;
    }
  // A vector more than needed, so that rows do not all fall on the same few sets of the cache.
  plan.row_words = most_lanes / Op::kPack + kLanes;
  plan.joined_words = most_lanes + kLanes;

  Arena arena(p.workspace);
  plan.panels = arena.take<Panel>(plan.num_panels);
  plan.chunks = arena.take<QueryChunk>(plan.num_chunks);
  plan.tiles = arena.take<KeyTile>(plan.num_tiles);
  plan.kv_heads = arena.take<int32_t>(heads);
  plan.turns = arena.take<float>(Turns::table_floats(p.past));
  if (p.workspace != nullptr) {
    int panel = 0, chunk = 0, tile = 0;
    for_each_panel(p.spans, [&](const Panel& value, int) { plan.panels[panel++] = value; });
    for_each_chunk(p.spans, [&](const QueryChunk& value) { plan.chunks[chunk++] = value; });
    for_each_key_tile(p.query_spans, plan.key_parts, [&](const KeyTile& value) { plan.tiles[tile++] = value; });
    order_by_past(p, count_past(p).most, plan.kv_heads);
    Turns::fill_table(p.past, plan.turns);
  }

  Arena one_slot(nullptr), one_worker(nullptr);
  for (int head = 0; head < p.num_heads / p.num_kv_heads; ++head) take_head_buffers<Op>(one_slot, plan, p.head_dim);
  take_tile_buffers<Op>(one_worker, plan, p.head_dim);
  plan.slot_bytes = one_slot.used() > 0 ? one_slot.used() : 1;
  plan.worker_bytes = one_worker.used();

  const int64_t most_slots = kMostPackedBytes / plan.slot_bytes, few_slots = kFewPackedBytes / plan.slot_bytes;
  const double operations = 10.0 * plan.lanes * (p.num_heads / p.num_kv_heads) * p.head_dim * kBackwardTileKeys *
                            (plan.num_tiles + plan.past_tiles);
  plan.whole_heads = heads >= threads && most_slots >= threads &&
                     (threads == 1 || heads >= kWholeHeadsPerThread * threads ||
                      (heads % threads == 0 && operations <= kSmallHeadOperations));
  int64_t slots = threads;
  if (!plan.whole_heads) {
    if (slots < few_slots) slots = few_slots;
    if (slots > heads) slots = heads;
    if (slots > most_slots) slots = most_slots > 0 ? most_slots : 1;
  }
  plan.slots = static_cast<int32_t>(slots);
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
  for (int part = 0; part < plan.key_parts; ++part) {
    to.tiles_done[part * plan.num_chunks + chunk_index] = 0;
    memset(to.grad_q + (static_cast<int64_t>(part) * plan.lanes + chunk.lane) * padded_dim, 0,
           static_cast<size_t>(chunk.lanes) * padded_dim * sizeof(float));
  }
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

// ---- Keys

// Calls pack(keys, values) to write `count` rows; those up to the next multiple of kKeyMultiple are 0.
template <typename Op, typename Pack>
void pack_keys(int count, int dim, const TileBuffers& to, const Pack& pack) {
  const int padded = round_up(count, kKeyMultiple);
  const PackedRows<Op> keys{dim, to.key_rows, to.keys_joined, round_up(dim, kLanes), 1};
  const PackedRows<Op> values{dim, to.value_rows, nullptr, 0, 0};
  pack(keys, values);
  keys.clear(count, padded);
  values.clear(count, padded);
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
