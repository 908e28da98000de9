// Tiles of keys and of values as Hopper's kernels stream them: from tensors and from pages, by tensor maps.
#pragma once
#include "cuda_hopper_tiles.cuh"

namespace selfforcing::attention_cuda {

struct KeyMaps {
  ptx::TensorMap k, v, k_pages, v_pages;
  int32_t page_rows;  // of a box of a page
};

// Whether the copy engine brings pages: the values at least.
inline bool copies_pages(const PagedPast& past) {
  return past.k_pages != nullptr && past.format == PageFormat::elements;
}

// In tiles of type Tile.
template <typename Tile>
int32_t page_rows_of_box(const PagedPast& past) {
  return copies_pages(past) ? page_box_rows(past.page_size, Tile::kRows) : 1;
}

// For tiles of type Tile.
template <typename Tile>
int32_t encode_keys(KeyMaps& maps, const AttentionParams& params) {
  const PagedPast& past = params.past;
  maps.page_rows = page_rows_of_box<Tile>(past);
  const auto own = [&](ptx::TensorMap& map, const ConstHeads& heads) {
    return encode_heads<Tile>(map, heads, params.batch, params.num_keys, params.num_kv_heads, params.head_dim);
  };
  const auto pages = [&](ptx::TensorMap& map, bool values) {
    return past.num_pages == 0 || !copies_pages(past)
               ? 0
               : encode_heads<Tile>(map, heads_of_pages(past, values), past.num_pages, past.page_size,
                                    params.num_kv_heads, params.head_dim, maps.page_rows);
  };
  int32_t error = own(maps.k, params.k);
  if (error == 0) error = own(maps.v, params.v);
  if (error == 0) error = pages(maps.k_pages, false);
  if (error == 0) error = pages(maps.v_pages, true);
  return error;
}

// The row of a buffer where a tile begins: a box of a page begins where the page's rows do.
__device__ __forceinline__ int first_row(const KeyMaps& maps, const ColumnTile& tile) {
  return tile.in_past() ? tile.start & (maps.page_rows - 1) : 0;
}

// Asks for a tile of the keys or the values of a head, by all lanes of a warp: a box for each of some lanes. `full`
// ends its phase when it is there.
template <typename Tile>
__device__ __forceinline__ void load_keys(const AttentionParams& params, const KeyMaps& maps, const ColumnTile& tile,
                                          int32_t stream, int32_t kv_head, bool values, const Tile& to,
                                          ptx::SharedAddress full) {
  const int first = first_row(maps, tile);
  const int boxes = tile.in_past() ? (first + tile.count + maps.page_rows - 1) / maps.page_rows : 1;
  const int rows = tile.in_past() ? maps.page_rows : Tile::kRows;
  if (lane() == 0) ptx::barrier_arrive_expect(full, boxes * rows * (Tile::kBytes / Tile::kRows));
  __syncwarp();
  if (lane() >= boxes) return;
  if (tile.in_past()) {
    const int row = lane() * maps.page_rows;
    const PagePlace place = place_in_pages(params.past.page_table + stream * params.past.table_stride,
                                           params.past.page_size, tile.start - first + row);
    to.load(values ? maps.v_pages : maps.k_pages, full, row, static_cast<int32_t>(place.offset), kv_head,
            static_cast<int32_t>(place.page));
  } else {
    to.load(values ? maps.v : maps.k, full, 0, tile.start, kv_head, stream);
  }
}

// Fills buffers of type Tile, by one warp, where pages hold what products take.
template <typename Tile>
class TileCopier {
 public:
  __device__ __forceinline__ TileCopier(const AttentionParams& params, const KeyMaps& maps)
      : params_(params), maps_(maps) {}

  // From here on tiles of this head; the first one.
  __device__ __forceinline__ void start(int32_t stream, int32_t kv_head, const ColumnTile& tile) {
    stream_ = stream, kv_head_ = kv_head;
    ahead_ = tile;
  }

  // On to the next tile; `ahead` is the one after it.
  __device__ __forceinline__ void advance(const ColumnTile& ahead) {
    now_ = ahead_;
    ahead_ = ahead;
  }

  // Fills an empty buffer with the keys of the tile, or its values. `full` ends its phase when it is there.
  template <bool kValues>
  __device__ __forceinline__ void fill(const Tile& to, ptx::SharedAddress full) const {
    load_keys(params_, maps_, now_, stream_, kv_head_, kValues, to, full);
  }

 private:
  const AttentionParams& params_;
  const KeyMaps& maps_;
  int32_t stream_ = 0, kv_head_ = 0;
  ColumnTile now_{}, ahead_{};
};

// The tile-th tile of the past of a head, where it is cut into tiles as long as buffers; `count` is 0 when there are
// fewer.
template <typename Tile>
__device__ __forceinline__ ColumnTile past_tile(const PagedPast& past, const KeyMaps& maps, int32_t stream,
                                                int32_t kv_head, int32_t tile) {
  const PastSpan* spans = past.spans_of(stream, kv_head);
  for (int32_t i = 0; i < past.num_spans; ++i) {
    const int32_t start = spans[i].start, end = spans[i].end, aligned = start & ~(maps.page_rows - 1);
    const int32_t tiles = end > start ? (end - aligned + Tile::kRows - 1) / Tile::kRows : 0;
    if (tile < tiles) {
      const int32_t from = max(start, aligned + tile * Tile::kRows);
      return {from, min(end, aligned + (tile + 1) * Tile::kRows) - from, i};
    }
    tile -= tiles;
  }
  return {0, 0, -1};
}

// Tiles that the past of a head can need: every span may begin and end in one that is not full.
template <typename Tile>
int32_t max_past_tiles(const PagedPast& past) {
  const int64_t positions = past.table_stride * past.page_size;
  const int64_t ends = static_cast<int64_t>(past.num_spans) * (Tile::kRows + page_rows_of_box<Tile>(past) - 2);
  return static_cast<int32_t>((positions + ends) / Tile::kRows);
}

// Where nothing is visible may be anything, which a probability of zero does not make zero: rows outside of [first,
// end) become zero before products with them, by `threads` consumers together, which start at the second warpgroup.
template <typename Tile>
__device__ __forceinline__ void clear_invisible(const Tile& tile, int first, int end, int threads) {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads;
  tile.clear(0, first, thread, threads);
  tile.clear(end, Tile::kRows, thread, threads);
  ptx::fence_async_proxy();
}

}  // namespace selfforcing::attention_cuda
