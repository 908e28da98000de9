// Which rows and columns a thread block of an attention kernel works on, and where they lie: tiles of rows that never
// cross the border of a block, spans cut into tiles of columns, heads of tensors and pages.
#pragma once
#include "../ptx/launch.cuh"
#include "../ptx/vector.cuh"
#include "params.h"

namespace selfforcing::attention_cuda {

using ptx::kFullWarp;
using ptx::kVector;
using ptx::kWarpSize;

// Blocks that shall fit on a multiprocessor, for __launch_bounds__. Left to itself the compiler aims at three and
// spills.
constexpr int kOneBlock = 1, kTwoBlocks = 2;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// ---- Rows: a tile never crosses the border of a block, so all of its rows see the same spans.

struct RowTile {
  int32_t block, start, count;
  int32_t copy = 0;
};

// Tiles that blocks of unknown borders can need: every block may end in one that is not full.
inline unsigned max_row_tiles(int32_t num_rows, const SpanTable& table, int32_t rows_per_tile) {
  return static_cast<unsigned>((num_rows + static_cast<int64_t>(table.num_blocks) * (rows_per_tile - 1)) /
                               rows_per_tile);
}

// The tile-th tile, found by every warp on its own: 32 blocks at a time, a running sum of their tiles. `count` is 0
// when there are fewer tiles. A block's tiles may be there in several copies, all tiles of one before those of the
// next.
template <int kRows, bool kLastBlockFirst = false>
__device__ RowTile find_row_tile(const SpanTable& table, int32_t num_rows, int32_t tile, int32_t copies = 1) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto nth_block = [&](int32_t n) { return kLastBlockFirst ? table.num_blocks - 1 - n : n; };
  for (int32_t first = 0; first < table.num_blocks; first += kWarpSize) {
    int32_t start = 0, end = 0;
    if (first + lane < table.num_blocks) {
      start = table.block_starts[nth_block(first + lane)];
      end = min(table.block_starts[nth_block(first + lane) + 1], num_rows);
    }
    const int32_t tiles = end > start ? (end - start + kRows - 1) / kRows : 0;
    int32_t tiles_so_far = tiles * copies;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int32_t before = __shfl_up_sync(kFullWarp, tiles_so_far, distance);
      if (lane >= distance) tiles_so_far += before;
    }
    const unsigned reached = __ballot_sync(kFullWarp, tile < tiles_so_far);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      const int32_t tiles_of_copy = __shfl_sync(kFullWarp, tiles, owner);
      const int32_t index = tile - __shfl_sync(kFullWarp, tiles_so_far - tiles * copies, owner);
      const int32_t row = __shfl_sync(kFullWarp, start, owner) + index % tiles_of_copy * kRows;
      return {nth_block(first + owner), row, min(kRows, __shfl_sync(kFullWarp, end, owner) - row),
              index / tiles_of_copy};
    }
    tile -= __shfl_sync(kFullWarp, tiles_so_far, kWarpSize - 1);
  }
  return {0, 0, 0};
}

// ---- Columns: the spans of the past, then those of the block, cut into tiles.

struct ColumnTile {
  int32_t start, count;
  int32_t span;  // of the past, that the tile is a part of; negative: not in the past

  __device__ __forceinline__ bool in_past() const { return span >= 0; }
};

template <int kColumns>
class ColumnTiles {
 public:
  __device__ __forceinline__ ColumnTiles(const SpanTable& table, int32_t block, int32_t num_columns)
      : spans_(table.spans + 2 * static_cast<int64_t>(table.span_offsets[block])),
        num_spans_(table.span_offsets[block + 1] - table.span_offsets[block]),
        num_columns_(num_columns) {}

  // Of all columns.
  __device__ __forceinline__ explicit ColumnTiles(int32_t num_columns)
      : spans_(nullptr), num_spans_(0), num_columns_(num_columns), end_(num_columns) {}

  __device__ __forceinline__ void prepend(const PagedPast& past, int32_t stream, int32_t kv_head) {
    if (past.k_pages == nullptr) return;
    past_spans_ = past.spans_of(stream, kv_head);
    num_past_spans_ = past.num_spans;
  }

  // Tiles of the past end at multiples of `rows`, a power of two that divides kColumns: then a row that is a multiple
  // of it begins a multiple of rows of a tile.
  __device__ __forceinline__ void align_past(int32_t rows) { past_alignment_ = rows; }

  // From here on every `step`-th tile only, starting with tile `first`.
  __device__ __forceinline__ void take_every(int32_t step, int32_t first) { step_ = step, skip_ = first; }

  __device__ __forceinline__ bool next(ColumnTile& tile) {
    for (; skip_ > 0; --skip_)
      if (!advance(tile)) return false;
    skip_ = step_ - 1;
    return advance(tile);
  }

 private:
  __device__ __forceinline__ bool advance(ColumnTile& tile) {
    while (position_ >= end_) {
      if (past_span_ + 1 < num_past_spans_) {
        ++past_span_;
        position_ = past_spans_[past_span_].start, end_ = past_spans_[past_span_].end;
      } else if (num_spans_ > 0) {
        past_span_ = -1, num_past_spans_ = 0;
        position_ = spans_[0], end_ = min(spans_[1], num_columns_);
        spans_ += 2, --num_spans_;
      } else {
        return false;
      }
    }
    const int32_t columns = kColumns - (past_span_ < 0 ? 0 : position_ & (past_alignment_ - 1));
    tile = {position_, min(columns, end_ - position_), past_span_};
    position_ += columns;
    return true;
  }

  const PastSpan* past_spans_ = nullptr;
  const int32_t* spans_;
  int32_t past_span_ = -1, num_past_spans_ = 0;
  int32_t num_spans_;
  int32_t num_columns_;
  int32_t position_ = 0, end_ = 0;
  int32_t past_alignment_ = 1;
  int32_t step_ = 1, skip_ = 0;
};

// ---- Backward by keys: rows are keys, of the block or of the past.

struct KeyTile {
  ColumnTile rows;  // `count` is 0 when there are fewer tiles
  int32_t block;    // in query_spans; of keys that are not in the past
};

inline unsigned max_past_tiles(const AttentionBackwardParams& params, int32_t rows_per_tile) {
  if (params.past_grads.k_pages == nullptr) return 0;
  const int64_t positions = params.past.table_stride * params.past.page_size;
  return static_cast<unsigned>((positions + static_cast<int64_t>(params.past.num_spans) * (rows_per_tile - 1)) /
                               rows_per_tile);
}

// The tile of this thread block: `past_tiles` of the past come first.
template <int kRows>
__device__ __forceinline__ KeyTile find_key_tile(const AttentionBackwardParams& params, int32_t stream, int32_t kv_head,
                                                 unsigned past_tiles) {
  if (blockIdx.x >= past_tiles) {
    const RowTile own =
        find_row_tile<kRows>(params.query_spans, params.num_keys, static_cast<int32_t>(blockIdx.x - past_tiles));
    return {{own.start, own.count, -1}, own.block};
  }
  int32_t tile = static_cast<int32_t>(blockIdx.x);
  const PastSpan* spans = params.past.spans_of(stream, kv_head);
  for (int32_t i = 0; i < params.past.num_spans; ++i) {
    const int32_t length = max(spans[i].end - spans[i].start, 0), tiles = (length + kRows - 1) / kRows;
    if (tile < tiles) return {{spans[i].start + tile * kRows, min(kRows, length - tile * kRows), i}, 0};
    tile -= tiles;
  }
  return {{0, 0, -1}, 0};
}

// ---- Memory

// Where a position of a stream lies.
struct PagePlace {
  int64_t page;
  uint32_t offset;
};

__device__ __forceinline__ PagePlace place_in_pages(const int32_t* page_table, int32_t page_size, int32_t position) {
  const uint32_t row = static_cast<uint32_t>(position) / static_cast<uint32_t>(page_size);
  return {page_table[row], static_cast<uint32_t>(position) - row * static_cast<uint32_t>(page_size)};
}

// One head of one stream: rows of head_dim elements, contiguous or in pages.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  bool aligned;                         // rows may be accessed kBytes at a time, see rows_aligned
  const int32_t* page_table = nullptr;  // nullptr: contiguous
  int64_t page_stride = 0;
  int32_t page_size = 1;

  __device__ __forceinline__ T* at(int32_t position) const {
    if (page_table == nullptr) return data + position * stride;
    return at(place_in_pages(page_table, page_size, position));
  }
  __device__ __forceinline__ T* at(const PagePlace& place) const {
    return data + place.page * page_stride + place.offset * stride;
  }
};

template <typename T, int kBytes = 16>
__device__ __forceinline__ bool rows_aligned(const void* data, int64_t stride) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return (address | static_cast<uintptr_t>(stride * static_cast<int64_t>(sizeof(T)))) % kBytes == 0;
}

template <typename T, typename Pointer>
__device__ __forceinline__ Rows<T> head_rows(const Heads<Pointer>& tensor, int32_t stream, int32_t head) {
  T* data = static_cast<T*>(tensor.data) + stream * tensor.batch_stride + head * tensor.head_stride;
  return {data, tensor.token_stride, rows_aligned<T>(data, tensor.token_stride)};
}

// As they are stored; T is what the strides count.
template <typename T, int kBytes = 16>
__device__ __forceinline__ Rows<const T> paged_rows(const PagedPast& past, bool values, int32_t stream, int32_t head) {
  const int64_t head_stride = values ? past.v_head_stride : past.k_head_stride;
  const int64_t stride = values ? past.v_token_stride : past.k_token_stride;
  const int64_t page_stride = values ? past.v_page_stride : past.k_page_stride;
  const T* data = static_cast<const T*>(values ? past.v_pages : past.k_pages) + head * head_stride;
  return {data,
          stride,
          rows_aligned<T, kBytes>(data, stride) && rows_aligned<T, kBytes>(data, page_stride),
          past.page_table + stream * past.table_stride,
          page_stride,
          past.page_size};
}

// ---- Which head of which stream a thread block works for.

struct Place {
  int32_t stream, head, kv_head;
};

__device__ __forceinline__ Place place_of_query_head(const AttentionParams& params) {
  const int32_t head = static_cast<int32_t>(blockIdx.y);
  return {static_cast<int32_t>(blockIdx.z), head, head / (params.num_heads / params.num_kv_heads)};
}

__device__ __forceinline__ int64_t row_of_head(const AttentionParams& params, int32_t stream, int32_t head) {
  return (static_cast<int64_t>(stream) * params.num_heads + head) * params.num_queries;
}
// Of all heads of all streams.
inline int64_t num_query_rows(const AttentionParams& params) {
  return static_cast<int64_t>(params.batch) * params.num_heads * params.num_queries;
}

}  // namespace selfforcing::attention_cuda
