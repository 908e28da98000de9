// How many thread blocks share a tile of rows: each takes every n-th of its tiles of columns, and a second kernel joins
// what they found. Decided by sizes alone, so that the same call gives the same bits.
#pragma once
#include <algorithm>

#include "cuda_rows.cuh"

namespace selfforcing::attention_cuda {

// At most, those of the past in whole pages.
inline int64_t max_keys(const AttentionParams& params) {
  const PagedPast& past = params.past;
  return params.num_keys + (past.k_pages == nullptr ? 0 : past.table_stride * past.page_size);
}

// ---- Grids with a thread block for each tile of queries

// With fewer tiles than multiprocessors as many blocks for a tile as there is room for, but some tiles of keys for
// each.
inline int32_t parts_of_keys(const AttentionParams& params, int32_t queries_per_tile, int32_t keys_per_tile) {
  constexpr int64_t kLeastTiles = 4;
  const int64_t tiles = static_cast<int64_t>(max_row_tiles(params.num_queries, params.spans, queries_per_tile)) *
                        params.num_heads * params.batch;
  const int64_t most = std::max<int64_t>(1, max_keys(params) / (kLeastTiles * keys_per_tile));
  return static_cast<int32_t>(std::clamp<int64_t>(tiles == 0 ? 1 : ptx::multiprocessors() / tiles, 1, most));
}

// ---- Grids as large as the GPU

// What a thread block does in a round: a tile of rows, or a part of its columns.
struct TilePart {
  int32_t tile;
  int32_t part, parts;  // every parts-th tile of columns, starting with number `part`
  int32_t shared_tile;  // among the tiles that have parts; negative: this one has none
};

// Tiles go to the thread blocks round after round. What does not fill a last round is split.
struct RoundSchedule {
  int32_t blocks;       // of threads
  int32_t whole_tiles;  // these first, then some that several thread blocks share
  int32_t parts;        // of those
  int32_t items;        // whole tiles and parts

  RoundSchedule(int32_t tiles, int64_t column_tiles, int32_t processors = ptx::multiprocessors()) {
    const int32_t last_round = tiles % processors;
    // As many parts as make the last rounds shortest. To start, end and join parts takes about as long as some tiles of
    // columns.
    constexpr int64_t kOverhead = 4, kMostParts = 64;
    const auto length = [&](int64_t n) {
      return (last_round * n + processors - 1) / processors * ((column_tiles + n - 1) / n + (n > 1 ? kOverhead : 0));
    };
    parts = 1;
    for (int32_t more = 2; more <= kMostParts && more <= column_tiles; ++more)
      if (length(more) < length(parts)) parts = more;
    whole_tiles = parts == 1 ? tiles : tiles - last_round;
    items = whole_tiles + (tiles - whole_tiles) * parts;
    blocks = std::min(items, processors);
  }

  // Of the tiles that have parts.
  int64_t shared_rows(int32_t rows_per_tile) const {
    return static_cast<int64_t>((items - whole_tiles) / parts) * rows_per_tile;
  }

  __device__ __forceinline__ TilePart at(int32_t item) const {
    const int32_t shared_item = item - whole_tiles;
    if (shared_item < 0) return {item, 0, 1, -1};
    return {whole_tiles + shared_item / parts, shared_item % parts, parts, shared_item / parts};
  }
};

// Of tiles of queries over the keys that they see.
inline RoundSchedule schedule_queries(const AttentionParams& params, int32_t queries_per_tile, int32_t keys_per_tile) {
  const int32_t tiles = static_cast<int32_t>(max_row_tiles(params.num_queries, params.spans, queries_per_tile)) *
                        params.batch * params.num_heads;
  return RoundSchedule(tiles, (max_keys(params) + keys_per_tile - 1) / keys_per_tile);
}

}  // namespace selfforcing::attention_cuda
