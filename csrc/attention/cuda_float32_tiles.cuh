// Tiles of float32 attention: how rows reach shared memory, and the two products, in full float32 (no tensor cores:
// they would round the factors to TF32).
//
// A thread block is 16 x 16 threads. Thread (y, x) owns the rows y + 16 i of a tile; of a tile of scores the columns
// x + 16 j; of an accumulator as wide as the head the columns 4 x + 64 c to 4 x + 64 c + 3. A row's sixteen threads are
// half a warp, so sums along a row are shuffles and a row's weights need no block barrier.
#pragma once
#include "cuda_past.cuh"

namespace selfforcing::attention_cuda {

constexpr int kRowThreads = 16;  // threads that share a row
constexpr int kThreads = kRowThreads * kRowThreads;

constexpr int kWide = 4;  // accumulator columns that a thread holds side by side: one float4
constexpr int kPad =
    4;  // floats added to a row of shared memory, so that eight rows lie in eight different groups of banks

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

// ---- From tensors to shared memory.

// A tile on its way: load() asks device memory for it, store() puts it into shared memory. Between the two a thread may
// compute. Rows from `count` on, and columns from `head_dim` on, are zero.
template <int kRows, int kHeadDim>
class Fetch {
 public:
  __device__ __forceinline__ void load(const Rows<const float>& rows, int32_t start, int32_t count, int32_t head_dim) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = row_of(i), column = column_of(i);
      bits_[i] = row < count && column < head_dim ? ptx::load_vector(rows.at(start + row) + column, rows.aligned)
                                                  : uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) *vector(tile, i) = bits_[i];
  }

  // The same of keys or values.
  __device__ __forceinline__ void load(const KeySource<float>& source, const ColumnTile& keys, int32_t head_dim) {
    if (source.quantised(keys))
      load_bytes(source, keys, head_dim);
    else
      load(source.rows(keys), keys.start, keys.count, head_dim);
  }
  __device__ __forceinline__ void store(float* tile, const KeySource<float>& source, const ColumnTile& keys,
                                        int32_t head_dim) const {
    store(tile);
    if (!source.coded(keys)) return;
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i)
      if (row_of(i) < keys.count && column_of(i) < head_dim)
        *vector(tile, i) = source.decode(*vector(tile, i), keys, source.stored_row(keys, row_of(i)), column_of(i));
  }

 private:
  static constexpr int kPerRow = kHeadDim / kVector<float>;
  static constexpr int kVectors = kRows * kPerRow / kThreads;
  static_assert(kVectors * kThreads == kRows * kPerRow, "a tile is a whole number of vectors per thread");

  __device__ __forceinline__ static int row_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) / kPerRow;
  }
  __device__ __forceinline__ static int column_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) % kPerRow * kVector<float>;
  }
  __device__ __forceinline__ static uint4* vector(float* tile, int i) {
    return reinterpret_cast<uint4*>(tile + row_of(i) * row_stride(kHeadDim) + column_of(i));
  }

  // Quantised rows: a vector's four bytes at its start.
  __device__ __forceinline__ void load_bytes(const KeySource<float>& source, const ColumnTile& keys, int32_t head_dim) {
    const Rows<const uint8_t> rows = source.bytes();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int row = row_of(i), column = column_of(i);
      bits_[i] = {0, 0, 0, 0};
      if (row >= keys.count || column >= head_dim) continue;
      const uint8_t* bytes = rows.at(keys.start + row) + source.byte_of(column);
      if (rows.aligned)
        bits_[i].x = *reinterpret_cast<const unsigned*>(bytes);
      else
        memcpy(&bits_[i].x, bytes, sizeof(unsigned));
    }
  }

  uint4 bits_[kVectors];
};

// ---- Products, out of shared memory into registers.

template <int kRows, int kColumns>
struct Scores {
  static constexpr int kM = kRows / kRowThreads, kN = kColumns / kRowThreads;
  float at[kM][kN];
};

// scores = a b^T over the first `depth` columns of both tiles. The rounding of a running sum grows with its length:
// every second column, beyond head dim 128 every fourth, has a sum of its own, of 64 products at most.
template <int kHeadDim, int kRows, int kColumns>
__device__ __forceinline__ void multiply(Scores<kRows, kColumns>& scores, const float* a, const float* b, int depth) {
  constexpr int kM = Scores<kRows, kColumns>::kM, kN = Scores<kRows, kColumns>::kN;
  constexpr int kStep = kRowThreads * row_stride(kHeadDim);
  const float* a_row = a + thread_y() * row_stride(kHeadDim);
  const float* b_row = b + thread_x() * row_stride(kHeadDim);
  constexpr int kSums = kHeadDim <= 128 ? 2 : 4;
  float sums[kM][kN][kSums] = {};
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
        float (&sum)[kSums] = sums[i][j];
        sum[0] = fmaf(left[i].x, right[j].x, sum[0]);
        sum[1] = fmaf(left[i].y, right[j].y, sum[1]);
        sum[2 % kSums] = fmaf(left[i].z, right[j].z, sum[2 % kSums]);
        sum[3 % kSums] = fmaf(left[i].w, right[j].w, sum[3 % kSums]);
      }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      scores.at[i][j] = sums[i][j][0] + sums[i][j][1];
      if constexpr (kSums == 4) scores.at[i][j] += sums[i][j][2] + sums[i][j][3];
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
  // += weights[kRows, kColumns] rows[kColumns, kHeadDim]; weights beyond `count` columns are zero and are skipped. A
  // tile is summed from zero and then added: the rounding of one running sum over all tiles would grow with its length.
  template <int kColumns>
  __device__ __forceinline__ void add(const float* weights, const float* rows, int count) {
    const float* weight_row = weights + thread_y() * row_stride(kColumns);
    const float* column = rows + thread_x() * kWide;
    float tile[kM][kChunks][kWide] = {};
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
            tile[i][c][0] = fmaf(weight[i][e], value.x, tile[i][c][0]);
            tile[i][c][1] = fmaf(weight[i][e], value.y, tile[i][c][1]);
            tile[i][c][2] = fmaf(weight[i][e], value.z, tile[i][c][2]);
            tile[i][c][3] = fmaf(weight[i][e], value.w, tile[i][c][3]);
          }
        }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < kWide; ++e) sum_[i][c][e] += tile[i][c][e];
  }

  // Multiplies the i-th of the thread's rows.
  __device__ __forceinline__ void scale(int i, float factor) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int e = 0; e < kWide; ++e) sum_[i][c][e] *= factor;
  }

  // Writes the first `count` rows, and `head_dim` columns of each.
  __device__ __forceinline__ void store(const Rows<float>& rows, int32_t start, int32_t count, int32_t head_dim) const {
    visit(count, head_dim, [&](int row, int column, const float (&sums)[kWide]) {
      ptx::store_vector(rows.at(start + row) + column, ptx::pack<float>(sums), rows.aligned);
    });
  }

  // Adds them to the gradients of the keys or values that the rows are, if they lie in the past.
  __device__ __forceinline__ void add_to_past(const AttentionBackwardParams& params, const KeySource<float>& source,
                                              const ColumnTile& keys) const {
    visit(keys.count, params.head_dim, [&](int row, int column, const float (&sums)[kWide]) {
      add_past_gradient(params, source, keys, row, column, sums);
    });
  }

 private:
  // Calls use(row, column, sums) for the sums that this thread has side by side.
  template <typename Use>
  __device__ __forceinline__ void visit(int32_t count, int32_t head_dim, const Use& use) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const int row = thread_y() + i * kRowThreads;
      if (row >= count) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int column = thread_x() * kWide + c * kWide * kRowThreads;
        if (column < head_dim) use(row, column, sum_[i][c]);
      }
    }
  }

  static constexpr int kM = kRows / kRowThreads, kChunks = kHeadDim / (kWide * kRowThreads);
  float sum_[kM][kChunks][kWide] = {};
};

}  // namespace selfforcing::attention_cuda
