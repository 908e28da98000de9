// Tiles for the attention kernels: who finds which rows, how rows reach shared memory, and the two products.
//
// A thread block is 16 x 16 threads. Thread (y, x) owns the rows y + 16 i of a tile; of a tile of scores the columns
// x + 16 j; of an accumulator as wide as the head the columns 4 x + 64 c to 4 x + 64 c + 3. A row's sixteen threads are
// half a warp, so sums along a row are shuffles and a row's weights need no block barrier.
//
// Tiles hold float32 whatever the tensor holds: one code path, one accuracy.
#pragma once
#include "../ptx/launch.cuh"
#include "../ptx/vector.cuh"
#include "params.h"

namespace selfforcing::attention_cuda {

using ptx::kFullWarp;
using ptx::kVector;
using ptx::kWarpSize;

constexpr int kRowThreads = 16;  // threads that share a row
constexpr int kThreads = kRowThreads * kRowThreads;

// Blocks that shall fit on a multiprocessor, for __launch_bounds__. Left to itself the compiler aims at three and
// spills.
constexpr int kOneBlock = 1, kTwoBlocks = 2;

constexpr int kWide = 4;  // accumulator columns that a thread holds side by side: one float4
constexpr int kPad =
    4;  // floats added to a row of shared memory, so that eight rows lie in eight different groups of banks
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

__host__ __device__ constexpr int row_stride(int columns) { return columns + kPad; }
__host__ __device__ constexpr int tile_floats(int rows, int columns) { return rows * row_stride(columns); }

__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x) % kRowThreads; }
__device__ __forceinline__ int thread_y() { return static_cast<int>(threadIdx.x) / kRowThreads; }

__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int lanes = kRowThreads / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullWarp, value, lanes);
  return value;
}

__device__ __forceinline__ float row_max(float value) {
#pragma unroll
  for (int lanes = kRowThreads / 2; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, lanes));
  return value;
}

// ---- Rows: a tile never crosses the border of a block, so all of its rows see the same spans.

struct RowTile {
  int32_t block, start, count;
};

// Tiles that blocks of unknown borders can need: every block may end in one that is not full.
inline unsigned max_row_tiles(int32_t num_rows, const SpanTable& table, int32_t rows_per_tile) {
  return static_cast<unsigned>((num_rows + static_cast<int64_t>(table.num_blocks) * (rows_per_tile - 1)) /
                               rows_per_tile);
}

// The tile-th tile, found by every warp on its own: 32 blocks at a time, a running sum of their tiles. `count` is 0
// when there are fewer tiles.
template <int kRows>
__device__ RowTile find_row_tile(const SpanTable& table, int32_t num_rows, int32_t tile) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int32_t first = 0; first < table.num_blocks; first += kWarpSize) {
    const int32_t block = first + lane;
    int32_t start = 0, end = 0;
    if (block < table.num_blocks) {
      start = table.block_starts[block];
      end = min(table.block_starts[block + 1], num_rows);
    }
    const int32_t tiles = end > start ? (end - start + kRows - 1) / kRows : 0;
    int32_t tiles_so_far = tiles;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int32_t before = __shfl_up_sync(kFullWarp, tiles_so_far, distance);
      if (lane >= distance) tiles_so_far += before;
    }
    const unsigned reached = __ballot_sync(kFullWarp, tile < tiles_so_far);
    if (reached != 0) {
      const int owner = __ffs(static_cast<int>(reached)) - 1;
      const int32_t index = tile - __shfl_sync(kFullWarp, tiles_so_far - tiles, owner);
      const int32_t row = __shfl_sync(kFullWarp, start, owner) + index * kRows;
      return {first + owner, row, min(kRows, __shfl_sync(kFullWarp, end, owner) - row)};
    }
    tile -= __shfl_sync(kFullWarp, tiles_so_far, kWarpSize - 1);
  }
  return {0, 0, 0};
}

// ---- Columns: the spans of the past, then those of the block, cut into tiles.

struct ColumnTile {
  int32_t start, count;
  bool in_past;
};

template <int kColumns>
class ColumnTiles {
 public:
  __device__ __forceinline__ ColumnTiles(const SpanTable& table, int32_t block, int32_t num_columns)
      : spans_(table.spans + 2 * static_cast<int64_t>(table.span_offsets[block])),
        num_spans_(table.span_offsets[block + 1] - table.span_offsets[block]),
        num_columns_(num_columns) {}

  __device__ __forceinline__ void prepend(const PagedPast& past, int32_t stream) {
    if (past.k_pages == nullptr) return;
    past_spans_ = past.spans + 2 * static_cast<int64_t>(stream) * past.num_spans;
    num_past_spans_ = past.num_spans;
  }

  __device__ __forceinline__ bool next(ColumnTile& tile) {
    while (position_ >= end_) {
      in_past_ = num_past_spans_ > 0;
      if (in_past_) {
        position_ = past_spans_[0], end_ = past_spans_[1];
        past_spans_ += 2, --num_past_spans_;
      } else if (num_spans_ > 0) {
        position_ = spans_[0], end_ = min(spans_[1], num_columns_);
        spans_ += 2, --num_spans_;
      } else {
        return false;
      }
    }
    tile = {position_, min(kColumns, end_ - position_), in_past_};
    position_ += kColumns;
    return true;
  }

 private:
  const int32_t* past_spans_ = nullptr;
  const int32_t* spans_;
  int32_t num_past_spans_ = 0;
  int32_t num_spans_;
  int32_t num_columns_;
  int32_t position_ = 0, end_ = 0;
  bool in_past_ = false;
};

// ---- From tensors to shared memory.

// One head of one stream: rows of head_dim elements, contiguous or in pages.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  bool aligned;                         // rows may be read and written 16 bytes at a time
  const int32_t* page_table = nullptr;  // nullptr: contiguous
  int64_t page_stride = 0;
  uint32_t page_size = 1;

  __device__ __forceinline__ T* at(int32_t position) const {
    if (page_table == nullptr) return data + position * stride;
    const uint32_t page = static_cast<uint32_t>(position) / page_size;
    const uint32_t offset = static_cast<uint32_t>(position) - page * page_size;
    return data + page_table[page] * page_stride + offset * stride;
  }
};

template <typename T>
__device__ __forceinline__ bool rows_aligned(const void* data, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * static_cast<int64_t>(sizeof(T)))) % 16 ==
         0;
}

template <typename T, typename Pointer>
__device__ __forceinline__ Rows<T> head_rows(const Heads<Pointer>& tensor, int32_t stream, int32_t head) {
  T* data = static_cast<T*>(tensor.data) + stream * tensor.batch_stride + head * tensor.head_stride;
  return {data, tensor.token_stride, rows_aligned<T>(data, tensor.token_stride)};
}

template <typename T>
__device__ __forceinline__ Rows<const T> paged_rows(const PagedPast& past, bool values, int32_t stream, int32_t head) {
  const int64_t head_stride = values ? past.v_head_stride : past.k_head_stride;
  const int64_t stride = values ? past.v_token_stride : past.k_token_stride;
  const int64_t page_stride = values ? past.v_page_stride : past.k_page_stride;
  const T* data = static_cast<const T*>(values ? past.v_pages : past.k_pages) + head * head_stride;
  return {data,
          stride,
          rows_aligned<T>(data, stride) && rows_aligned<T>(data, page_stride),
          past.page_table + stream * past.table_stride,
          page_stride,
          static_cast<uint32_t>(past.page_size)};
}

// A tile on its way: load() asks device memory for it, store() puts it into shared memory as float32. Between the two a
// thread may compute. Rows from `count` on, and columns from `head_dim` on, are zero.
template <typename T, int kRows, int kHeadDim>
class Fetch {
 public:
  __device__ __forceinline__ void load(const Rows<const T>& rows, int32_t start, int32_t count, int32_t head_dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = row_of(i), column = column_of(i);
      bits_[i] = row < count && column < head_dim ? ptx::load_vector(rows.at(start + row) + column, rows.aligned)
                                                  : uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float values[kVector<T>];
      ptx::unpack<T>(bits_[i], values);
      float* target = tile + row_of(i) * row_stride(kHeadDim) + column_of(i);
#pragma unroll
      for (int j = 0; j < kVector<T>; j += 4)
        *reinterpret_cast<float4*>(target + j) = float4{values[j], values[j + 1], values[j + 2], values[j + 3]};
    }
  }

 private:
  static constexpr int kPerRow = kHeadDim / kVector<T>;
  static constexpr int kVectors = kRows * kPerRow / kThreads;
  static_assert(kVectors * kThreads == kRows * kPerRow, "a tile is a whole number of vectors per thread");

  __device__ __forceinline__ static int row_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) / kPerRow;
  }
  __device__ __forceinline__ static int column_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) % kPerRow * kVector<T>;
  }

  uint4 bits_[kVectors];
};

// ---- Products, out of shared memory into registers.

template <int kRows, int kColumns>
struct Scores {
  static constexpr int kM = kRows / kRowThreads, kN = kColumns / kRowThreads;
  float at[kM][kN];
};

// scores = a b^T over the first `depth` columns of both tiles.
template <int kHeadDim, int kRows, int kColumns>
__device__ __forceinline__ void multiply(Scores<kRows, kColumns>& scores, const float* a, const float* b, int depth) {
  constexpr int kM = Scores<kRows, kColumns>::kM, kN = Scores<kRows, kColumns>::kN;
  constexpr int kStep = kRowThreads * row_stride(kHeadDim);
  const float* a_row = a + thread_y() * row_stride(kHeadDim);
  const float* b_row = b + thread_x() * row_stride(kHeadDim);
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j) scores.at[i][j] = 0.0f;
#pragma unroll 2
  for (int d = 0; d < depth; d += 4) {
    float4 left[kM], right[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) left[i] = *reinterpret_cast<const float4*>(a_row + i * kStep + d);
#pragma unroll
    for (int j = 0; j < kN; ++j) right[j] = *reinterpret_cast<const float4*>(b_row + j * kStep + d);
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        scores.at[i][j] = fmaf(left[i].x, right[j].x, scores.at[i][j]);
        scores.at[i][j] = fmaf(left[i].y, right[j].y, scores.at[i][j]);
        scores.at[i][j] = fmaf(left[i].z, right[j].z, scores.at[i][j]);
        scores.at[i][j] = fmaf(left[i].w, right[j].w, scores.at[i][j]);
      }
  }
}

// Writes a thread's scores where the other threads of its rows read them: see Accumulator::add.
template <int kRows, int kColumns>
__device__ __forceinline__ void share(const Scores<kRows, kColumns>& scores, float* weights) {
  __syncwarp();  // the previous weights are used up
#pragma unroll
  for (int i = 0; i < Scores<kRows, kColumns>::kM; ++i)
#pragma unroll
    for (int j = 0; j < Scores<kRows, kColumns>::kN; ++j)
      weights[(thread_y() + i * kRowThreads) * row_stride(kColumns) + thread_x() + j * kRowThreads] = scores.at[i][j];
  __syncwarp();
}

// A [kRows, kHeadDim] sum in registers.
template <int kRows, int kHeadDim>
class Accumulator {
 public:
  // += weights[kRows, kColumns] rows[kColumns, kHeadDim]; weights beyond `count` columns are zero and are skipped.
  template <int kColumns>
  __device__ __forceinline__ void add(const float* weights, const float* rows, int count) {
    const float* weight_row = weights + thread_y() * row_stride(kColumns);
    const float* column = rows + thread_x() * kWide;
    for (int k = 0; k < count; k += 4) {
      float weight[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(weight_row + i * kRowThreads * row_stride(kColumns) + k);
        weight[i][0] = four.x, weight[i][1] = four.y, weight[i][2] = four.z, weight[i][3] = four.w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const float4 value =
              *reinterpret_cast<const float4*>(column + (k + e) * row_stride(kHeadDim) + c * kWide * kRowThreads);
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            sum_[i][c][0] = fmaf(weight[i][e], value.x, sum_[i][c][0]);
            sum_[i][c][1] = fmaf(weight[i][e], value.y, sum_[i][c][1]);
            sum_[i][c][2] = fmaf(weight[i][e], value.z, sum_[i][c][2]);
            sum_[i][c][3] = fmaf(weight[i][e], value.w, sum_[i][c][3]);
          }
        }
    }
  }

  // Multiplies the i-th of the thread's rows.
  __device__ __forceinline__ void scale(int i, float factor) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int e = 0; e < kWide; ++e) sum_[i][c][e] *= factor;
  }

  // Writes the first `count` rows, and `head_dim` columns of each.
  template <typename T>
  __device__ __forceinline__ void store(const Rows<T>& rows, int32_t start, int32_t count, int32_t head_dim) const {
    struct alignas(kWide * sizeof(T)) Four {
      T element[kWide];
    };
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int row = thread_y() + i * kRowThreads;
      if (row >= count) continue;
      T* target = rows.at(start + row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = thread_x() * kWide + c * kWide * kRowThreads;
        if (column >= head_dim) continue;
        Four four;
#pragma unroll
        for (int e = 0; e < kWide; ++e) four.element[e] = ptx::from_float<T>(sum_[i][c][e]);
        if (rows.aligned) {
          *reinterpret_cast<Four*>(target + column) = four;
        } else {
#pragma unroll
          for (int e = 0; e < kWide; ++e) target[column + e] = four.element[e];
        }
      }
    }
  }

 private:
  static constexpr int kM = kRows / kRowThreads, kChunks = kHeadDim / (kWide * kRowThreads);
  float sum_[kM][kChunks][kWide] = {};
};

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

}  // namespace selfforcing::attention_cuda
