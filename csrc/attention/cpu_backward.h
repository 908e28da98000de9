// The backward pass: tiles of keys outside, chunks of queries inside. With scores transposed as in the forward pass,
// probabilities and gradients of scores are operands of the products for grad_v and grad_k as they are.
//
// One thread holds the gradients of a tile of keys. Gradients of queries are summed over tiles in memory, a chunk at a
// time and always in the order of the tiles, whichever thread computes them. With fewer heads than threads every head's
// keys are divided into parts with sums of their own, so that threads need not wait for each other: then the number of
// threads decides how the sum is rounded, but never which thread was faster.
#pragma once
#include <sched.h>

#include "cpu_backward_pack.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

// Probabilities and gradients of scores of one panel against `count` keys; the panel's lanes start at `offset` of a
// row.
template <typename Op, int kVectors>
__attribute__((noinline)) void differentiate_panel(const TileBuffers& tile, const BackwardPlan& plan,
                                                   const HeadBuffers& head, int64_t lane, int offset, int count,
                                                   int dim, float softmax_scale, float bias) {
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
        const Floats lse = load(head.lse + lane + j * kLanes) - bias, scales = broadcast(softmax_scale);
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
void write_grad_q(const AttentionBackwardParams& p, const BackwardPlan& plan, const QueryChunk& chunk, int batch,
                  int head, const HeadBuffers& from) {
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes);
  for (int i = chunk.first_panel; i < chunk.first_panel + chunk.num_panels; ++i) {
    const Panel& panel = plan.panels[i];
    for (int query = 0; query < panel.count; ++query) {
      auto* to = row_of<Op>(p.grad_q, batch, head, panel.query + query);
      const float* sums = from.grad_q + static_cast<int64_t>(panel.lane + query) * padded_dim;
      for (int d = 0; d < dim; d += kLanes) {
        Floats sum = load(sums + d);
        for (int part = 1; part < plan.key_parts; ++part)
          sum += load(sums + static_cast<int64_t>(part) * plan.lanes * padded_dim + d);
        store<typename Op::Element>(to + d, sum * p.softmax_scale, dim - d < kLanes ? dim - d : kLanes);
      }
    }
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

// ---- Gradients of the past

// The page of gradients for keys of the past, -1 if none.
inline int64_t gradient_page(const AttentionBackwardParams& p, int batch, const KeyPlace& place) {
  return p.past_grads.page_table[batch * p.past.table_stride + place.first / p.past.page_size];
}

// Whether one of the next `count` keys of the past has a place for its gradient.
inline bool any_gradient(const AttentionBackwardParams& p, int batch, KeyWalk past, int64_t count) {
  if (p.past_grads.k_pages == nullptr) return false;
  for (KeyPlace place{}; count > 0; count -= place.count) {
    place = past.next(static_cast<int>(count));
    if (gradient_page(p, batch, place) >= 0) return true;
  }
  return false;
}

// Adds the gradients of a tile, that is of the next `count` keys of the past, to where they have a place: those of keys
// as they are stored.
inline void add_past_gradients(const AttentionBackwardParams& p, const BackwardPlan& plan, int batch, int kv_head,
                               KeyWalk past, int count, const TileBuffers& tile) {
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes);
  KeyPlace place{};
  for (int key = 0; key < count; key += place.count) {
    place = past.next(count - key);
    const int64_t page = gradient_page(p, batch, place);
    if (page < 0) continue;
    const int64_t first = ((page * p.past.page_size + place.first % p.past.page_size) * p.num_kv_heads + kv_head) * dim;
    const int64_t stride = int64_t{p.num_kv_heads} * dim;
    const auto add = [&](float* to, Floats x, int lanes)
                         __attribute__((always_inline)) { store<Float32>(to, load<Float32>(to, lanes) + x, lanes); };
    const auto sum_k = [&](int i, int64_t d) __attribute__((always_inline)) {
      return load(tile.grad_k + int64_t{key + i} * padded_dim + d) * p.softmax_scale;
    };
    float *grad_k = p.past_grads.k_pages + first, *grad_v = p.past_grads.v_pages + first;
    if (p.past.rope_table == nullptr) {
      for (int i = 0; i < place.count; ++i, grad_k += stride)
        for_lanes(dim, [&](int64_t d, int lanes) { add(grad_k + d, sum_k(i, d), lanes); });
    } else {
      Turns turns(p.past, plan.turns, token_of(place));
      for (int i = 0; i < place.count; ++i, grad_k += stride, turns.next())
        turns.for_channels(dim, [&](int64_t d, Floats pairs, int lanes) __attribute__((always_inline)) {
          add(grad_k + d, rotate_pairs_back(sum_k(i, d), pairs), lanes);
        });
    }
    for (int i = 0; i < place.count; ++i, grad_v += stride)
      for_lanes(dim, [&](int64_t d, int lanes) {
        add(grad_v + d, load(tile.grad_v + int64_t{key + i} * padded_dim + d), lanes);
      });
  }
}

// ---- One tile of keys against all queries that see it

inline bool sees(const AttentionBackwardParams& p, const KeyTile& keys, const QueryChunk& chunk) {
  for (int i = p.query_spans.span_offsets[keys.block]; i < p.query_spans.span_offsets[keys.block + 1]; ++i)
    if (p.query_spans.spans[2 * i] < chunk.end_query && chunk.first_query < p.query_spans.spans[2 * i + 1]) return true;
  return false;
}

// Waits until the tiles from `first` to before `tile` that add to a chunk have done so. They are being computed: items
// are handed out in the order of the tiles.
inline void await_turn(const AttentionBackwardParams& p, const BackwardPlan& plan, int past_tiles, int first, int tile,
                       int chunk, const int32_t* done) {
  int before = tile - 1;  // the last tile before this one that adds to the chunk; every tile of the past does
  while (before >= first && before >= past_tiles && !sees(p, plan.tiles[before - past_tiles], plan.chunks[chunk]))
    --before;
  const int wanted = before < first ? 0 : before + 1;
  for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != wanted; ++spins)
    if (spins > 1000) sched_yield();
}

// The part of a chunk whose queries lie in [first_query, end_query) against the packed tile, whose keys get no gradient
// if they are `constant`.
template <typename Op, typename AwaitTurn>
void differentiate_chunk(const AttentionBackwardParams& p, const BackwardPlan& plan, const QueryChunk& chunk,
                         int first_query, int end_query, const HeadBuffers& head, const TileBuffers& tile, int count,
                         float bias, bool constant, const AwaitTurn& await) {
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes), padded = round_up(count, kKeyMultiple);
  int64_t lane = -1;
  int lanes = 0;
  for (int i = chunk.first_panel; i < chunk.first_panel + chunk.num_panels; ++i) {
    const Panel& panel = plan.panels[i];
    if (panel.query < first_query || panel.query >= end_query) continue;
    if (lane < 0) lane = panel.lane;
    with_vectors(panel.vectors, [&](auto vectors) {
      differentiate_panel<Op, decltype(vectors)::kValue>(tile, plan, head, panel.lane, lanes, count, dim,
                                                         p.softmax_scale, bias);
    });
    lanes += panel.vectors * kLanes;
  }
  if (!constant) {
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

// Tile `index_in_part` of a part of the keys; tiles of the past are counted first. `in_turn`: other threads work on the
// same head.
template <typename Op>
void differentiate_tile(const AttentionBackwardParams& p, const BackwardPlan& plan, int slot, int batch, int kv_head,
                        int part, int index_in_part, bool in_turn, const TileBuffers& tile) {
  const int past_tiles = num_past_tiles(p, batch, kv_head);
  const int64_t tiles = past_tiles + plan.num_tiles;
  const int first = static_cast<int>(tiles * part / plan.key_parts), index = first + index_in_part;
  if (index >= tiles * (part + 1) / plan.key_parts) return;  // another part or another stream has more
  const bool past = index < past_tiles;
  const int dim = p.head_dim, padded_dim = round_up(dim, kLanes), group = p.num_heads / p.num_kv_heads;
  VisibleKeys<Op> visible_past(p, batch, kv_head, -1, plan.turns);
  const KeyStretch stretch = past ? go_to_tile(visible_past, index) : KeyStretch{};
  const KeyWalk places = visible_past;
  const bool constant = past && !any_gradient(p, batch, places, stretch.count);
  KeyTile keys{};
  const int32_t everything[2] = {0, p.num_queries};
  const int32_t* spans = everything;
  int num_spans = 1;
  if (past) {
    keys.count = static_cast<int>(stretch.count);
    pack_keys<Op>(keys.count, dim, tile, [&](const PackedRows<Op>& k, const PackedRows<Op>& v) {
      for (int key = 0; key < keys.count;) key += visible_past.pack_some(key, keys.count - key, k, v);
    });
  } else {
    keys = plan.tiles[index - past_tiles];
    const int32_t* offsets = p.query_spans.span_offsets + keys.block;
    spans = p.query_spans.spans + static_cast<int64_t>(offsets[0]) * 2;
    num_spans = offsets[1] - offsets[0];
    if (num_spans > 0)
      pack_keys<Op>(keys.count, dim, tile, [&](const PackedRows<Op>& k, const PackedRows<Op>& v) {
        pack_rows<Op>(row_of<Op>(p.k, batch, kv_head, keys.key), p.k.token_stride, keys.count, 0, k);
        pack_rows<Op>(row_of<Op>(p.v, batch, kv_head, keys.key), p.v.token_stride, keys.count, 0, v);
      });
  }
  if (!constant) {
    const size_t bytes = static_cast<size_t>(round_up(keys.count, kKeyMultiple)) * padded_dim * sizeof(float);
    memset(tile.grad_k, 0, bytes);
    memset(tile.grad_v, 0, bytes);
  }
  for (int i = 0; i < group; ++i) {
    HeadBuffers head = head_in_slot<Op>(plan, slot, i, dim);
    head.grad_q += static_cast<int64_t>(part) * plan.lanes * padded_dim;
    head.tiles_done += part * plan.num_chunks;
    for (int c = 0; c < plan.num_chunks; ++c) {
      const QueryChunk& chunk = plan.chunks[c];
      bool added = false;
      for (int span = 0; span < num_spans; ++span) {
        if (spans[2 * span] >= chunk.end_query || chunk.first_query >= spans[2 * span + 1]) continue;
        differentiate_chunk<Op>(p, plan, chunk, spans[2 * span], spans[2 * span + 1], head, tile, keys.count,
                                stretch.bias, constant, [&] {
                                  if (in_turn && !added)
                                    await_turn(p, plan, past_tiles, first, index, c, head.tiles_done + c);
                                });
        added = true;
      }
      if (in_turn && added) __atomic_store_n(head.tiles_done + c, index + 1, __ATOMIC_RELEASE);
    }
  }
  if (constant) return;
  if (past) return add_past_gradients(p, plan, batch, kv_head, places, keys.count, tile);
  write_grad_keys<Op>(p.grad_k, batch, kv_head, keys, tile.grad_k, p.softmax_scale, dim);
  write_grad_keys<Op>(p.grad_v, batch, kv_head, keys, tile.grad_v, 1, dim);
}

template <typename Op>
void backward(const AttentionBackwardParams& p) {
  const BackwardPlan plan = plan_backward<Op>(p);
  const int group = p.num_heads / p.num_kv_heads;
  const int tiles_of_part = (plan.past_tiles + plan.num_tiles + plan.key_parts - 1) / plan.key_parts;  // at most
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const auto pack = [&](int slot, int64_t kv_head, int in_group, int chunk) {
    const int batch = static_cast<int>(kv_head / p.num_kv_heads);
    const int head = static_cast<int>(kv_head % p.num_kv_heads) * group + in_group;
    pack_chunk<Op>(p, plan, chunk, batch, head, head_in_slot<Op>(plan, slot, in_group, p.head_dim));
  };
  const auto differentiate = [&](int slot, int64_t kv_head, int part, int tile, bool in_turn, int32_t worker) {
    Arena arena(plan.workers + worker * plan.worker_bytes);
    differentiate_tile<Op>(p, plan, slot, static_cast<int>(kv_head / p.num_kv_heads),
                           static_cast<int>(kv_head % p.num_kv_heads), part, tile, in_turn,
                           take_tile_buffers<Op>(arena, plan, p.head_dim));
  };
  const auto write = [&](int slot, int64_t kv_head, int in_group, int chunk) {
    const int batch = static_cast<int>(kv_head / p.num_kv_heads);
    const int head = static_cast<int>(kv_head % p.num_kv_heads) * group + in_group;
    write_grad_q<Op>(p, plan, plan.chunks[chunk], batch, head, head_in_slot<Op>(plan, slot, in_group, p.head_dim));
  };

  if (plan.whole_heads) {
    p.parallel.for_each(heads, [&](int64_t item, int32_t worker) {
      const int32_t kv_head = plan.kv_heads[item];
      for (int i = 0; i < group; ++i)
        for (int chunk = 0; chunk < plan.num_chunks; ++chunk) pack(worker, kv_head, i, chunk);
      for (int tile = 0; tile < tiles_of_part; ++tile) differentiate(worker, kv_head, 0, tile, false, worker);
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
        work(static_cast<int>(head / group), plan.kv_heads[first + head / group], static_cast<int>(head % group),
             static_cast<int>(item % plan.num_chunks));
      });
    };
    for_each_query_chunk(pack);
    p.parallel.for_each(slots * plan.key_parts * tiles_of_part, [&](int64_t item, int32_t worker) {
      const int slot = static_cast<int>(item % slots);
      const int part = static_cast<int>(item / slots % plan.key_parts);
      differentiate(slot, plan.kv_heads[first + slot], part, static_cast<int>(item / slots / plan.key_parts), true,
                    worker);
    });
    for_each_query_chunk(write);
  }
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
