// The forward pass (FlashAttention, arXiv 2205.14135) with transposed scores: lanes are queries. Then the softmax is
// purely vertical, keys and values are broadcast operands, and the probabilities of a tile are the next product's
// operand as they are.
#pragma once
#include "cpu_past.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

// Keys and values of a tile stay in L1 beside the scores of a panel.
inline constexpr int kForwardTileKeys = 128;
// Queries that share a packed tile: enough that packing costs little, few enough that their sums stay in L2.
inline constexpr int kForwardUnitLanes = 512;
// With this many items per thread threads finish together, however the work is divided.
inline constexpr int kForwardItemsPerThread = 4;
// For the choice of a division: packing a key takes as long as this many queries that attend to it, merging the sums of
// one more part of the keys as long as this many keys, and another parallel loop as long as this many operations.
inline constexpr int kPackingLanes = 8, kMergingKeys = 4, kLoopOperations = 1 << 19;

// Neighbouring panels of one block.
struct ForwardUnit {
  int32_t block, first_panel, num_panels;
};

// How a call is divided into items, each the work of one thread: a unit of queries of some heads of a group, which
// share packed keys, against one part of the keys. Results depend on key_parts alone.
struct ForwardDivision {
  int32_t unit_lanes = kForwardUnitLanes;  // at most about this many in a unit
  int32_t unit_heads = 1;
  int32_t key_parts = 1;
};

struct ForwardPlan : ForwardDivision {
  Panel* panels = nullptr;
  ForwardUnit* units = nullptr;
  int32_t* kv_heads = nullptr;            // of all streams, in the order of their items
  float* turns = nullptr;                 // the table of Turns
  int32_t num_panels = 0, num_units = 0;  // of one head
  int32_t lanes = 0;                      // of all panels
  char* workers = nullptr;
  float* parts = nullptr;  // sums of every part of the keys, if there are several
  int64_t worker_bytes = 0, bytes = 0;
};

// What the keys so far add up to, of lanes that lie side by side.
struct ForwardSums {
  float* values;   // per panel [d][lane]: sum of exp(score - largest) value
  float* largest;  // [lane]: largest score so far, in units of log2
  float* total;    // [lane]: sum of exp(score - largest)

  ForwardSums from(int64_t lane, int dim) const { return {values + lane * dim, largest + lane, total + lane}; }
};

// Packed operands and sums of an item, in the workspace of its worker.
struct ForwardBuffers {
  float* keys;     // words [key][word]
  float* values;   // words [d / kLanes][key / kPack][kLanes]
  float* scores;   // [key][lane of the panel]; then probabilities, words [key / kPack][lane]
  float* queries;  // per head and panel words [word][lane]
  ForwardSums sums;
};

inline ForwardSums take_forward_sums(Arena& arena, int dim, int64_t lanes) {
  ForwardSums sums;
  sums.values = arena.take<float>(dim * lanes);
  sums.largest = arena.take<float>(lanes);
  sums.total = arena.take<float>(lanes);
  return sums;
}

template <typename Op>
ForwardBuffers take_forward_buffers(Arena& arena, const ForwardPlan& plan, int dim) {
  const int words = dim / Op::kPack, padded_dim = round_up(dim, kLanes);
  // Pieces of a block differ by a panel.
  const int64_t lanes = static_cast<int64_t>(plan.unit_lanes + 2 * kMaxPanelVectors * kLanes) * plan.unit_heads;
  ForwardBuffers to;
  to.keys = arena.take<float>(static_cast<int64_t>(kForwardTileKeys) * words + kLanes);
  to.values = arena.take<float>(static_cast<int64_t>(kForwardTileKeys / Op::kPack) * padded_dim);
  to.scores = arena.take<float>(kForwardTileKeys * kMaxPanelVectors * kLanes);
  to.queries = arena.take<float>(words * lanes);
  to.sums = take_forward_sums(arena, dim, plan.key_parts == 1 ? lanes : 0);
  return to;
}

// Sums of all queries of one head over one part of the keys.
inline ForwardSums sums_of_part(const ForwardPlan& plan, int64_t head, int part, int dim) {
  const int64_t floats = static_cast<int64_t>(plan.lanes) * (dim + 2), index = head * plan.key_parts + part;
  float* values = plan.parts + index * floats;
  return {values, values + static_cast<int64_t>(plan.lanes) * dim,
          values + static_cast<int64_t>(plan.lanes) * (dim + 1)};
}

// Calls visit(unit, lanes) for the units of one head when a unit holds at most about `limit` lanes.
template <typename Visit>
void for_each_forward_unit(const SpanTable& spans, int limit, const Visit& visit) {
  int first = 0, panels = 0, lanes = 0, current = 0;
  const auto split = [&] {
    const int pieces = (lanes + limit - 1) / limit;
    for (int piece = 0; piece < pieces; ++piece) {
      const int start = static_cast<int>(static_cast<int64_t>(panels) * piece / pieces);
      const int end = static_cast<int>(static_cast<int64_t>(panels) * (piece + 1) / pieces);
      if (start < end)
        visit(ForwardUnit{current, first + start, end - start},
              static_cast<int>(static_cast<int64_t>(lanes) * (end - start) / panels));
    }
    first += panels, panels = 0, lanes = 0;
  };
  for_each_panel(spans, [&](const Panel& panel, int block) {
    if (block != current) split();
    current = block;
    ++panels, lanes += panel.vectors * kLanes;
  });
  split();
}

// The division that is done soonest. With few heads, that is a matter of equal shares for all threads: more and smaller
// units, or fewer heads together, or parts of the keys.
inline ForwardDivision divide_forward(const AttentionParams& p, int most_lanes, const PastCounts& past) {
  const int group = p.num_heads / p.num_kv_heads, threads = p.parallel.num_threads;
  const int64_t kv_heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  ForwardDivision best;
  if (most_lanes == 0) return best;  // no queries
  double best_time = -1;
  bool enough = false;
  const int fewest = most_lanes <= kForwardUnitLanes ? 1 : (most_lanes + kForwardUnitLanes - 1) / kForwardUnitLanes;
  for (int pieces = fewest; pieces * kLanes <= most_lanes && !enough; ++pieces) {
    ForwardDivision division;
    division.unit_lanes = round_up((most_lanes + pieces - 1) / pieces, kLanes);
    division.unit_heads =
        kForwardUnitLanes / division.unit_lanes < group ? kForwardUnitLanes / division.unit_lanes : group;
    if (division.unit_heads < 1) division.unit_heads = 1;
    for (; division.unit_heads > 0 && !enough; division.unit_heads /= 2) {
      const int64_t sets = (group + division.unit_heads - 1) / division.unit_heads;  // of the heads of a group
      int64_t items = 0, most_keys = 0;
      double sum = 0, most = 0, least = 0;
      for_each_forward_unit(p.spans, division.unit_lanes, [&](const ForwardUnit& unit, int lanes) {
        const int64_t keys = num_block_keys(p.spans, unit.block);
        const double cost = lanes * division.unit_heads + kPackingLanes;  // of a key
        const double largest = cost * (keys + past.most), smallest = cost * (keys + past.least);
        items += kv_heads * sets;
        sum += cost * sets * (kv_heads * keys + past.sum);
        most_keys = keys + past.most > most_keys ? keys + past.most : most_keys;
        most = largest > most ? largest : most;
        least = least == 0 || smallest < least ? smallest : least;
      });
      const int64_t tiles = (most_keys + kForwardTileKeys - 1) / kForwardTileKeys;
      for (division.key_parts = 1; division.key_parts <= threads && division.key_parts <= tiles; ++division.key_parts) {
        const int parts = division.key_parts;
        const double share = static_cast<double>((tiles + parts - 1) / parts) / tiles;
        // Equal items in rounds, or items of all sizes, the longest first.
        const double rounds = static_cast<double>((items * parts + threads - 1) / threads) * most * share;
        const double packed = sum / threads + least * share;
        double time = rounds < packed ? rounds : packed;
        if (parts > 1) time += kLoopOperations / (4.0 * p.head_dim) + sum / most_keys * parts * kMergingKeys / threads;
        if (best_time < 0 || time < best_time) best = division, best_time = time;
        if (items * parts >= kForwardItemsPerThread * threads) break;
      }
      enough = items >= kForwardItemsPerThread * threads;
    }
  }
  return best;
}

// Sizes of all buffers and, where there is a workspace, the tables in it.
template <typename Op>
ForwardPlan plan_forward(const AttentionParams& p) {
  ForwardPlan plan;
  int block_lanes = 0, most_lanes = 0, current = -1;
  for_each_panel(p.spans, [&](const Panel& panel, int block) {
    ++plan.num_panels;
    plan.lanes = panel.lane + panel.vectors * kLanes;
    block_lanes = (block == current ? block_lanes : 0) + panel.vectors * kLanes;
    current = block;
    most_lanes = block_lanes > most_lanes ? block_lanes : most_lanes;
  });
  const PastCounts past = count_past(p);
  static_cast<ForwardDivision&>(plan) = divide_forward(p, most_lanes, past);
  for_each_forward_unit(p.spans, plan.unit_lanes, [&](const ForwardUnit&, int) { ++plan.num_units; });
  Arena arena(p.workspace);
  plan.panels = arena.take<Panel>(plan.num_panels);
  plan.units = arena.take<ForwardUnit>(plan.num_units);
  plan.kv_heads = arena.take<int32_t>(static_cast<int64_t>(p.batch) * p.num_kv_heads);
  plan.turns = arena.take<float>(Turns::table_floats(p.past));
  if (p.workspace != nullptr) {
    int panel = 0, unit = 0;
    for_each_panel(p.spans, [&](const Panel& value, int) { plan.panels[panel++] = value; });
    for_each_forward_unit(p.spans, plan.unit_lanes, [&](const ForwardUnit& value, int) { plan.units[unit++] = value; });
    order_by_past(p, past.most, plan.kv_heads);
    Turns::fill_table(p.past, plan.turns);
  }
  Arena one_worker(nullptr);
  take_forward_buffers<Op>(one_worker, plan, p.head_dim);
  plan.worker_bytes = one_worker.used();
  plan.workers = arena.take<char>(plan.worker_bytes * p.parallel.num_threads);
  if (plan.key_parts > 1)
    plan.parts =
        arena.take<float>(static_cast<int64_t>(p.batch) * p.num_heads * plan.key_parts * plan.lanes * (p.head_dim + 2));
  plan.bytes = arena.used();
  return plan;
}

// Gathers the next `count` visible keys and values; rows up to the next multiple of kKeyMultiple are 0.
template <typename Op>
void pack_tile(VisibleKeys<Op>& visible, int count, int dim, const ForwardBuffers& to) {
  const int padded = round_up(count, kKeyMultiple);
  const PackedRows<Op> keys{dim, to.keys, nullptr, 0, 0};
  const PackedRows<Op> values{dim, nullptr, to.values, kLanes, padded / Op::kPack};
  for (int key = 0; key < count;) key += visible.pack_some(key, count - key, keys, values);
  keys.clear(count, padded);
  values.clear(count, padded);
}

// One panel against one tile of `count` keys. `factor` is |softmax_scale| log2(e), `bias` is in units of log2; `first`:
// nothing is summed yet.
template <typename Op, int kVectors>
__attribute__((noinline)) void attend_panel(const ForwardBuffers& at, const float* queries, const ForwardSums& sums_at,
                                            int count, int dim, float factor, float bias, bool first) {
  constexpr int kWidth = kVectors * kLanes;
  const int words = dim / Op::kPack, padded = round_up(count, kKeyMultiple);
  float *scores = at.scores, *sums = sums_at.values;

  Floats largest[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) largest[j] = broadcast(-__builtin_inff());
  for (int key = 0; key < padded; key += kTileRows) {
    Floats tile[kTileRows][kVectors] = {};
    multiply<Op>(tile, at.keys + key * words, words, 1, queries, kWidth, words);
    const int rows = count - key;  // of this tile; those beyond are padding
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        store(scores + (key + i) * kWidth + j * kLanes, tile[i][j]);
        if (i < rows) largest[j] = maximum(largest[j], tile[i][j]);
      }
    }
  }

  Floats rescale[kVectors] = {}, total[kVectors] = {}, offset[kVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float* so_far = sums_at.largest + j * kLanes;
    largest[j] = largest[j] * factor + bias;
    if (!first) {
      const Floats before = load(so_far);
      largest[j] = maximum(largest[j], before);
      rescale[j] = exp2(before - largest[j], kExp2Float32);
    }
    store(so_far, largest[j]);
    offset[j] = largest[j] - bias;
  }

  const Floats factors = broadcast(factor);
  float* probabilities = scores;  // in place: a row of words is written after the rows of scores it comes from
  int key = 0;
  for (; key + Op::kPack <= count; key += Op::kPack) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Floats weights[Op::kPack];
#pragma GCC unroll 2
      for (int i = 0; i < Op::kPack; ++i) {
        const Floats score = load(scores + (key + i) * kWidth + j * kLanes);
        weights[i] = exp2(multiply_subtract(score, factors, offset[j]), Op::kExp2);
        total[j] += weights[i];
      }
      store(probabilities + key / Op::kPack * kWidth + j * kLanes, Op::join(weights));
    }
  }
  for (; key < padded; key += Op::kPack) {
    for (int j = 0; j < kVectors; ++j) {
      Floats weights[Op::kPack] = {};
      if (key < count) {  // an odd last key, the first of its pair
        const Floats score = load(scores + key * kWidth + j * kLanes);
        weights[0] = exp2(multiply_subtract(score, factors, offset[j]), Op::kExp2);
        total[j] += weights[0];
      }
      store(probabilities + key / Op::kPack * kWidth + j * kLanes, Op::join(weights));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float* so_far = sums_at.total + j * kLanes;
    store(so_far, first ? total[j] : multiply_add(rescale[j], load(so_far), total[j]));
  }

  // Every tile is summed from zero and then added: one running sum over all keys would lose accuracy.
  const int steps = padded / Op::kPack;
  for (int d = 0; d < dim; d += kTileRows) {
    Floats tile[kTileRows][kVectors] = {};
    multiply<Op>(tile, at.values + static_cast<int64_t>(d / kLanes) * steps * kLanes + d % kLanes, 1, kLanes,
                 probabilities, kWidth, steps);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* sum = sums + (d + i) * kWidth + j * kLanes;
        store(sum, first ? tile[i][j] : multiply_add(rescale[j], load(sum), tile[i][j]));
      }
    }
  }
}

// out = sums / total, turned back to rows of queries, and lse.
template <typename Op>
void finish_panel(const AttentionParams& p, const ForwardSums& sums, const Panel& panel, int batch, int head) {
  float* lse = p.lse + (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + panel.query;
  const int width = panel.vectors * kLanes, dim = p.head_dim;
  for (int j = 0; j < panel.vectors; ++j) {
    const int queries = panel.count - j * kLanes < kLanes ? panel.count - j * kLanes : kLanes;
    const Floats total = load(sums.total + j * kLanes), inverse = 1.0f / total;
    const Floats largest = load(sums.largest + j * kLanes);
    store<Float32>(lse + j * kLanes, multiply_add(largest, broadcast(kLn2), log(total)), queries);
    for (int d = 0; d < dim; d += kLanes) {
      const int columns = dim - d < kLanes ? dim - d : kLanes;
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = i < columns ? inverse * load(sums.values + (d + i) * width + j * kLanes) : Floats{};
      transpose(block);
      auto* out = row_of<Op>(p.out, batch, head, panel.query + j * kLanes) + d;
      for (int i = 0; i < queries; ++i) store<typename Op::Element>(out + i * p.out.token_stride, block[i], columns);
    }
  }
}

template <typename Op>
void clear_queries(const AttentionParams& p, const Panel& panel, int batch, int head) {
  float* lse = p.lse + (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries;
  for (int query = panel.query; query < panel.query + panel.count; ++query) {
    memset(row_of<Op>(p.out, batch, head, query), 0, p.head_dim * sizeof(typename Op::Storage));
    lse[query] = -__builtin_inff();
  }
}

// Adds the parts of the keys up, in their order, into the first.
inline void merge_panel(const ForwardPlan& plan, const Panel& panel, int64_t head, int parts, int dim) {
  const int width = panel.vectors * kLanes;
  const ForwardSums to = sums_of_part(plan, head, 0, dim).from(panel.lane, dim);
  for (int j = 0; j < width; j += kLanes) {
    Floats largest = load(to.largest + j);
    for (int part = 1; part < parts; ++part)
      largest = maximum(largest, load(sums_of_part(plan, head, part, dim).largest + panel.lane + j));
    for (int part = 0; part < parts; ++part) {
      const ForwardSums from = sums_of_part(plan, head, part, dim).from(panel.lane, dim);
      const Floats rescale = exp2(load(from.largest + j) - largest, kExp2Float32);
      const auto add = [&](float* sum, const float* more) {
        store(sum, part == 0 ? rescale * load(more) : multiply_add(rescale, load(more), load(sum)));
      };
      add(to.total + j, from.total + j);
      for (int d = 0; d < dim; ++d) add(to.values + d * width + j, from.values + d * width + j);
    }
    store(to.largest + j, largest);
  }
}

// The keys of one part, in tiles: those from `first` on.
struct KeyPart {
  int64_t first, count;
  int tile;  // keys in a tile, at most
};

inline KeyPart part_of_keys(int64_t count, int part, int parts) {
  const int tile = tile_size(count, kForwardTileKeys);
  const int64_t tiles = tile == 0 ? 0 : (count + tile - 1) / tile;
  if (tiles < parts) parts = static_cast<int>(tiles);
  if (part >= parts) return {0, 0, tile};  // the last parts of few keys are empty
  const int64_t first = tiles * part / parts * tile, end = tiles * (part + 1) / parts * tile;
  return {first, (end < count ? end : count) - first, tile};
}

template <typename Op>
void attend_unit(const AttentionParams& p, const ForwardPlan& plan, const ForwardUnit& unit, int batch, int kv_head,
                 int first_head, int num_heads, int part, const ForwardBuffers& at) {
  const Panel* panels = plan.panels + unit.first_panel;
  const int dim = p.head_dim, words = dim / Op::kPack;
  const auto for_each_panel_of_heads = [&](const auto& visit) {
    for (int head = first_head; head < first_head + num_heads; ++head)
      for (int i = 0; i < unit.num_panels; ++i) visit(panels[i], head);
  };
  VisibleKeys<Op> visible(p, batch, kv_head, unit.block, plan.turns);
  const KeyPart keys = part_of_keys(num_visible_keys(p, batch, kv_head, unit.block), part, plan.key_parts);
  if (keys.count == 0) {
    if (part == 0)
      for_each_panel_of_heads([&](const Panel& panel, int head) { clear_queries<Op>(p, panel, batch, head); });
    return;
  }
  const int unit_lanes =
      panels[unit.num_panels - 1].lane + panels[unit.num_panels - 1].vectors * kLanes - panels[0].lane;
  const auto lane_of = [&](const Panel& panel, int head) {
    return static_cast<int64_t>(head - first_head) * unit_lanes + panel.lane - panels[0].lane;
  };
  const auto sums_of = [&](const Panel& panel, int head) {
    if (plan.key_parts == 1) return at.sums.from(lane_of(panel, head), dim);
    return sums_of_part(plan, static_cast<int64_t>(batch) * p.num_heads + head, part, dim).from(panel.lane, dim);
  };
  // A negative scale goes into the sign of the queries, so that the largest product is the largest score.
  const float factor = (p.softmax_scale < 0 ? -p.softmax_scale : p.softmax_scale) * kLog2E;
  const uint32_t flip = p.softmax_scale < 0 ? (Op::kPack == 2 ? 0x80008000u : 0x80000000u) : 0;
  for_each_panel_of_heads([&](const Panel& panel, int head) {
    pack_lanes<Op>(at.queries + lane_of(panel, head) * words, panel.vectors, row_of<Op>(p.q, batch, head, panel.query),
                   p.q.token_stride, panel.count, dim, flip);
  });
  visible.skip(keys.first);
  for (int64_t done = 0; done < keys.count;) {
    const KeyStretch tile = visible.stretch(keys.count - done < keys.tile ? keys.count - done : keys.tile);
    const int count = static_cast<int>(tile.count);
    pack_tile<Op>(visible, count, dim, at);
    for_each_panel_of_heads([&](const Panel& panel, int head) {
      with_vectors(panel.vectors, [&](auto vectors) {
        attend_panel<Op, decltype(vectors)::kValue>(at, at.queries + lane_of(panel, head) * words, sums_of(panel, head),
                                                    count, dim, factor, tile.bias * kLog2E, done == 0);
      });
    });
    done += count;
  }
  if (plan.key_parts == 1)
    for_each_panel_of_heads(
        [&](const Panel& panel, int head) { finish_panel<Op>(p, sums_of(panel, head), panel, batch, head); });
}

template <typename Op>
void merge_unit(const AttentionParams& p, const ForwardPlan& plan, const ForwardUnit& unit, int batch, int head) {
  const int64_t keys = num_visible_keys(p, batch, head / (p.num_heads / p.num_kv_heads), unit.block);
  if (keys == 0) return;  // cleared
  int parts = 0;          // that have keys
  const int64_t row = static_cast<int64_t>(batch) * p.num_heads + head;
  while (parts < plan.key_parts && part_of_keys(keys, parts, plan.key_parts).count > 0) ++parts;
  for (int i = unit.first_panel; i < unit.first_panel + unit.num_panels; ++i) {
    merge_panel(plan, plan.panels[i], row, parts, p.head_dim);
    finish_panel<Op>(p, sums_of_part(plan, row, 0, p.head_dim).from(plan.panels[i].lane, p.head_dim), plan.panels[i],
                     batch, head);
  }
}

template <typename Op>
void forward(const AttentionParams& p) {
  const ForwardPlan plan = plan_forward<Op>(p);
  const int group = p.num_heads / p.num_kv_heads, sets = (group + plan.unit_heads - 1) / plan.unit_heads;
  const int64_t kv_heads = static_cast<int64_t>(p.batch) * p.num_kv_heads;
  const int64_t items_of_head = static_cast<int64_t>(sets) * plan.num_units * plan.key_parts;
  p.parallel.for_each(kv_heads * items_of_head, [&](int64_t item, int32_t worker) {
    const int32_t of_all = plan.kv_heads[item / items_of_head];
    const int batch = of_all / p.num_kv_heads, kv_head = of_all % p.num_kv_heads;
    const int part = static_cast<int>(item % plan.key_parts);
    const int in_group = static_cast<int>(item / plan.key_parts % sets) * plan.unit_heads;
    // Later blocks see more keys: the longest units first.
    const int unit = plan.num_units - 1 - static_cast<int>(item / plan.key_parts / sets % plan.num_units);
    Arena arena(plan.workers + worker * plan.worker_bytes);
    attend_unit<Op>(p, plan, plan.units[unit], batch, kv_head, kv_head * group + in_group,
                    group - in_group < plan.unit_heads ? group - in_group : plan.unit_heads, part,
                    take_forward_buffers<Op>(arena, plan, p.head_dim));
  });
  if (plan.key_parts == 1) return;
  p.parallel.for_each(static_cast<int64_t>(p.batch) * p.num_heads * plan.num_units, [&](int64_t item, int32_t) {
    const int64_t head = item / plan.num_units;
    merge_unit<Op>(p, plan, plan.units[item % plan.num_units], static_cast<int>(head / p.num_heads),
                   static_cast<int>(head % p.num_heads));
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
