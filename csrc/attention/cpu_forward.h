// The forward pass (FlashAttention, arXiv 2205.14135) with transposed scores: lanes are queries. Then the softmax is
// purely vertical, keys and values are broadcast operands, and the probabilities of a tile are the next product's
// operand as they are.
#pragma once
#include "cpu_layout.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

// Keys and values of a tile stay in L1 beside the scores of a panel.
inline constexpr int kForwardTileKeys = 128;
// Queries that share a packed tile: enough that packing costs little, few enough that their sums stay in L2.
inline constexpr int kForwardUnitLanes = 512;
inline constexpr int kForwardLeastLanes = 4 * kLanes;
// Units per thread below which units are made smaller, so that threads finish together.
inline constexpr int kForwardUnitsPerThread = 4;

// Neighbouring panels of one block: the work of one thread on one head.
struct ForwardUnit {
  int32_t block, first_panel, num_panels;
};

struct ForwardPlan {
  Panel* panels = nullptr;
  ForwardUnit* units = nullptr;
  int32_t num_panels = 0, num_units = 0;  // units of one head
  int32_t unit_lanes = 0;                 // at most
  char* workers = nullptr;
  int64_t worker_bytes = 0, bytes = 0;
};

// Packed operands and sums of a unit, in the workspace of its worker.
struct ForwardBuffers {
  float* keys;     // words [key][word]
  float* values;   // words [d / kLanes][key / kPack][kLanes]
  float* scores;   // [key][lane of the panel]; then probabilities, words [key / kPack][lane]
  float* queries;  // per panel words [word][lane]
  float* sums;     // per panel [d][lane]: sum of exp(score - largest) value
  float* largest;  // [lane]: largest score so far, in units of log2
  float* total;    // [lane]: sum of exp(score - largest)
};

template <typename Op>
ForwardBuffers take_forward_buffers(Arena& arena, int dim, int lanes) {
  const int words = dim / Op::kPack, padded_dim = round_up(dim, kLanes);
  ForwardBuffers to;
  to.keys = arena.take<float>(static_cast<int64_t>(kForwardTileKeys) * words);
  to.values = arena.take<float>(static_cast<int64_t>(kForwardTileKeys / Op::kPack) * padded_dim);
  to.scores = arena.take<float>(kForwardTileKeys * kMaxPanelVectors * kLanes);
  to.queries = arena.take<float>(static_cast<int64_t>(words) * lanes);
  to.sums = arena.take<float>(static_cast<int64_t>(dim) * lanes);
  to.largest = arena.take<float>(lanes);
  to.total = arena.take<float>(lanes);
  return to;
}

// Calls visit(unit) for the units of one head when a unit holds at most about `limit` lanes.
template <typename Visit>
void for_each_forward_unit(const SpanTable& spans, int limit, const Visit& visit) {
  int first = 0, panels = 0, lanes = 0, current = 0;
  const auto split = [&] {
    const int pieces = (lanes + limit - 1) / limit;
    for (int piece = 0; piece < pieces; ++piece) {
      const int start = static_cast<int>(static_cast<int64_t>(panels) * piece / pieces);
      const int end = static_cast<int>(static_cast<int64_t>(panels) * (piece + 1) / pieces);
      if (start < end) visit(ForwardUnit{current, first + start, end - start});
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

// Sizes of all buffers and, where there is a workspace, the tables in it. Which queries share a unit depends on the
// number of threads but does not change their results.
template <typename Op>
ForwardPlan plan_forward(const AttentionParams& p) {
  ForwardPlan plan;
  for_each_panel(p.spans, [&](const Panel&, int) { ++plan.num_panels; });
  const int64_t heads = static_cast<int64_t>(p.batch) * p.num_heads;
  int limit = kForwardUnitLanes;
  while (true) {
    plan.num_units = 0;
    for_each_forward_unit(p.spans, limit, [&](const ForwardUnit&) { ++plan.num_units; });
    if (limit <= kForwardLeastLanes || plan.num_units * heads >= kForwardUnitsPerThread * p.parallel.num_threads) break;
    limit /= 2;
  }
  Arena arena(p.workspace);
  plan.panels = arena.take<Panel>(plan.num_panels);
  plan.units = arena.take<ForwardUnit>(plan.num_units);
  plan.unit_lanes = limit + 2 * kMaxPanelVectors * kLanes;  // pieces of a block differ by a panel
  if (p.workspace != nullptr) {
    int panel = 0, unit = 0;
    for_each_panel(p.spans, [&](const Panel& value, int) { plan.panels[panel++] = value; });
    for_each_forward_unit(p.spans, limit, [&](const ForwardUnit& value) { plan.units[unit++] = value; });
  }
  Arena one_worker(nullptr);
  take_forward_buffers<Op>(one_worker, p.head_dim, plan.unit_lanes);
  plan.worker_bytes = one_worker.used();
  plan.workers = arena.take<char>(plan.worker_bytes * p.parallel.num_threads);
  plan.bytes = arena.used();
  return plan;
}

// Gathers the next `count` visible keys and values; rows up to the next multiple of kKeyMultiple are 0.
template <typename Op>
void pack_tile(VisibleKeys<Op>& visible, int count, int dim, const ForwardBuffers& to) {
  const int padded = round_up(count, kKeyMultiple), steps = padded / Op::kPack, words = dim / Op::kPack;
  const auto put_values = [&](int key, Row<Op> const(&rows)[Op::kPack]) {
    Op::join_rows(rows, dim, [&](int d, Floats joined) {
      store(to.values + (static_cast<int64_t>(d / kLanes) * steps + key / Op::kPack) * kLanes, joined);
    });
  };
  alignas(64) static constexpr typename Op::Storage kZeros[256] = {};
  Row<Op> pair[Op::kPack] = {};  // rows that become one word
  for (int key = 0; key < count;) {
    const KeyRun<Op> run = visible.next(count - key);
    for (int i = 0; i < run.count; ++i, ++key) {
      prefetch_row<Op>(run.k + (i + kPrefetchRows) * run.k_stride, dim);
      prefetch_row<Op>(run.v + (i + kPrefetchRows) * run.v_stride, dim);
      pack_row<Op>(to.keys + key * words, run.k + i * run.k_stride, dim);
      pair[key % Op::kPack] = run.v + i * run.v_stride;
      if (key % Op::kPack == Op::kPack - 1) put_values(key, pair);
    }
  }
  for (int key = count; key < padded; ++key) {
    memset(to.keys + key * words, 0, words * sizeof(float));
    pair[key % Op::kPack] = kZeros;
    if (key % Op::kPack == Op::kPack - 1) put_values(key, pair);
  }
}

// One panel against one tile of `count` keys. `factor` is |softmax_scale| log2(e); `first`: nothing is summed yet.
template <typename Op, int kVectors>
__attribute__((noinline)) void attend_panel(const ForwardBuffers& at, int lane, int count, int dim, float factor,
                                            bool first) {
  constexpr int kWidth = kVectors * kLanes;
  const int words = dim / Op::kPack, padded = round_up(count, kKeyMultiple);
  const float* queries = at.queries + static_cast<int64_t>(lane) * words;
  float *scores = at.scores, *sums = at.sums + static_cast<int64_t>(lane) * dim;

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

  Floats rescale[kVectors] = {}, total[kVectors] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float* so_far = at.largest + lane + j * kLanes;
    largest[j] = largest[j] * factor;
    if (!first) {
      const Floats before = load(so_far);
      largest[j] = maximum(largest[j], before);
      rescale[j] = exp2(before - largest[j], kExp2Float32);
    }
    store(so_far, largest[j]);
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
        weights[i] = exp2(multiply_subtract(score, factors, largest[j]), Op::kExp2);
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
        weights[0] = exp2(multiply_subtract(score, factors, largest[j]), Op::kExp2);
        total[j] += weights[0];
      }
      store(probabilities + key / Op::kPack * kWidth + j * kLanes, Op::join(weights));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    float* so_far = at.total + lane + j * kLanes;
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
void finish_panel(const AttentionParams& p, const ForwardBuffers& at, const Panel& panel, int lane, int batch,
                  int head) {
  float* lse = p.lse + (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + panel.query;
  const int width = panel.vectors * kLanes, dim = p.head_dim;
  const float* sums = at.sums + static_cast<int64_t>(lane) * dim;
  for (int j = 0; j < panel.vectors; ++j) {
    const int queries = panel.count - j * kLanes < kLanes ? panel.count - j * kLanes : kLanes;
    const Floats total = load(at.total + lane + j * kLanes), inverse = 1.0f / total;
    const Floats largest = load(at.largest + lane + j * kLanes);
    store<Float32>(lse + j * kLanes, multiply_add(largest, broadcast(kLn2), log(total)), queries);
    for (int d = 0; d < dim; d += kLanes) {
      const int columns = dim - d < kLanes ? dim - d : kLanes;
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = i < columns ? inverse * load(sums + (d + i) * width + j * kLanes) : Floats{};
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

template <typename Op>
void attend_unit(const AttentionParams& p, const ForwardPlan& plan, const ForwardUnit& unit, int batch, int head,
                 const ForwardBuffers& at) {
  const Panel* panels = plan.panels + unit.first_panel;
  VisibleKeys<Op> visible(p, batch, head / (p.num_heads / p.num_kv_heads), unit.block);
  int64_t left = visible.count();
  if (left == 0) {
    for (int i = 0; i < unit.num_panels; ++i) clear_queries<Op>(p, panels[i], batch, head);
    return;
  }
  // A negative scale goes into the sign of the queries, so that the largest product is the largest score.
  const float factor = (p.softmax_scale < 0 ? -p.softmax_scale : p.softmax_scale) * kLog2E;
  const uint32_t flip = p.softmax_scale < 0 ? (Op::kPack == 2 ? 0x80008000u : 0x80000000u) : 0;
  for (int i = 0; i < unit.num_panels; ++i) {
    const int64_t lane = panels[i].lane - panels[0].lane;
    pack_lanes<Op>(at.queries + lane * (p.head_dim / Op::kPack), panels[i].vectors,
                   row_of<Op>(p.q, batch, head, panels[i].query), p.q.token_stride, panels[i].count, p.head_dim, flip);
  }
  const int tile = tile_size(left, kForwardTileKeys);
  for (bool first = true; left > 0; first = false) {
    const int count = left < tile ? static_cast<int>(left) : tile;
    pack_tile<Op>(visible, count, p.head_dim, at);
    for (int i = 0; i < unit.num_panels; ++i)
      with_vectors(panels[i].vectors, [&](auto vectors) {
        attend_panel<Op, decltype(vectors)::kValue>(at, panels[i].lane - panels[0].lane, count, p.head_dim, factor,
                                                    first);
      });
    left -= count;
  }
  for (int i = 0; i < unit.num_panels; ++i)
    finish_panel<Op>(p, at, panels[i], panels[i].lane - panels[0].lane, batch, head);
}

template <typename Op>
void forward(const AttentionParams& p) {
  const ForwardPlan plan = plan_forward<Op>(p);
  p.parallel.for_each(static_cast<int64_t>(p.batch) * p.num_heads * plan.num_units, [&](int64_t item, int32_t worker) {
    const int64_t head = item / plan.num_units;
    // Later blocks see more keys: the longest units first.
    const ForwardUnit& unit = plan.units[plan.num_units - 1 - item % plan.num_units];
    Arena arena(plan.workers + worker * plan.worker_bytes);
    const ForwardBuffers buffers = take_forward_buffers<Op>(arena, p.head_dim, plan.unit_lanes);
    attend_unit<Op>(p, plan, unit, static_cast<int>(head / p.num_heads), static_cast<int>(head % p.num_heads), buffers);
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
