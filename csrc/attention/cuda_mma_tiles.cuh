// Tiles of bfloat16 and float16 attention on tensor cores (since sm_80): rows go from device memory to shared memory
// without passing a register, from there as fragments (csrc/ptx/mma.cuh) into products with float32 sums.
//
// A thread block is four warps; each owns some 16-row fragments of the tile of rows, so a row's four lanes are a quad.
#pragma once
#include "../ptx/mma.cuh"
#include "cuda_past.cuh"

namespace selfforcing::attention_cuda {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = kMmaWarps * kWarpSize;
constexpr int kFragmentRows = 16, kFragmentColumns = 8, kFragmentDepth = 16;
constexpr int kChunk = 8;  // elements in 16 bytes

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kWarpSize); }

// Over the four lanes of a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

// Rows in shared memory. The 16-byte chunks of a row change places with the row, so that eight rows' chunks of one
// column lie in eight different groups of banks, however they are read.
template <typename T, int kTileRows, int kHeadDim>
class SharedTile {
 public:
  static constexpr int kRows = kTileRows, kColumns = kHeadDim;
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kBytes = kRows * kHeadDim * static_cast<int>(sizeof(T));
  static_assert(kChunks % 4 == 0);

  __device__ __forceinline__ explicit SharedTile(unsigned char* data)
      : data_(data), address_(ptx::shared_address(data)) {}

  // Of 16 bytes, from the start of the tile.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return row * kChunks * 16 + (chunk ^ swizzle(row)) * 16;
  }
  __device__ __forceinline__ T* at(int row, int chunk) const {
    return reinterpret_cast<T*>(data_ + offset(row, chunk));
  }

  // Asks for `count` rows from `start` on; the others, and columns from head_dim on, become zero.
  __device__ __forceinline__ void copy(const Rows<const T>& rows, int32_t start, int32_t count,
                                       int32_t head_dim) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const T* source = row < count ? rows.at(start + row) : rows.data;
#pragma unroll 4
      for (int i = 0; i < kChunksOfThread; ++i) {
        const int chunk = chunk_of(i);
        const bool exists = row < count && chunk * kChunk < head_dim;
        if (rows.aligned)
          ptx::copy_async(address_ + offset(row, chunk), source + chunk * kChunk, exists ? 16 : 0);
        else
          *reinterpret_cast<uint4*>(at(row, chunk)) =
              exists ? ptx::load_vector(source + chunk * kChunk, false) : uint4{0, 0, 0, 0};
      }
    }
  }

  // The same of keys or values, as they are stored.
  __device__ __forceinline__ void copy(const KeySource<T>& source, const ColumnTile& tile, int32_t head_dim) const {
    if (source.quantised(tile))
      copy_bytes(source, tile, head_dim);
    else
      copy(source.rows(tile), tile.start, tile.count, head_dim);
  }

  // Makes of them what the products take, once this thread's copies have arrived; a barrier shows it to others.
  __device__ __forceinline__ void decode(const KeySource<T>& source, const ColumnTile& tile, int32_t head_dim) const {
    if (!source.coded(tile)) return;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const bool row_exists = row < tile.count;
      const StoredRow stored = row_exists ? source.stored_row(tile, row) : StoredRow{};
#pragma unroll 2
      for (int i = 0; i < kChunksOfThread; ++i) {
        const int chunk = chunk_of(i);
        uint4& bits = *reinterpret_cast<uint4*>(at(row, chunk));
        const bool exists = row_exists && chunk * kChunk < head_dim;
        bits = exists ? source.decode(bits, tile, stored, chunk * kChunk) : uint4{0, 0, 0, 0};
      }
    }
  }

  // Fragments: 16 rows x 16 columns as a left factor; 16 rows as the 16 columns of a right factor; 16 rows x 16 columns
  // as a right factor. `row` is a multiple of 16, so the swizzle depends on the lane alone.
  __device__ __forceinline__ void load_left(unsigned (&to)[4], int row, int depth) const {
    ptx::load_matrices(to, address_ + offset(lane() % 16, depth * 2 + lane() / 16) + row * kChunks * 16);
  }
  __device__ __forceinline__ void load_right_transposed(unsigned (&to)[4], int row, int depth) const {
    ptx::load_matrices(
        to, address_ + offset(lane() / 16 * 8 + lane() % 8, depth * 2 + lane() / 8 % 2) + row * kChunks * 16);
  }
  __device__ __forceinline__ void load_right(unsigned (&to)[4], int row, int column_pair) const {
    ptx::load_matrices_transposed(to,
                                  address_ + offset(lane() % 16, column_pair * 2 + lane() / 16) + row * kChunks * 16);
  }

 private:
  // Four threads move a row together, each every fourth chunk: where a row is has to be found once for all of them.
  static constexpr int kRowThreads = 4, kRowsAtOnce = kMmaThreads / kRowThreads;
  static constexpr int kPasses = kRows / kRowsAtOnce, kChunksOfThread = kChunks / kRowThreads;
  static_assert(kPasses * kRowsAtOnce == kRows);

  __device__ __forceinline__ static int row_of(int pass) {
    return static_cast<int>(threadIdx.x) / kRowThreads + pass * kRowsAtOnce;
  }
  __device__ __forceinline__ static int chunk_of(int i) {
    return static_cast<int>(threadIdx.x) % kRowThreads + i * kRowThreads;
  }

  // Quantised rows: a chunk's kChunk bytes at its start.
  __device__ __forceinline__ void copy_bytes(const KeySource<T>& source, const ColumnTile& tile,
                                             int32_t head_dim) const {
    const Rows<const uint8_t> rows = source.bytes();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row_of(pass);
      const uint8_t* bytes = row < tile.count ? rows.at(tile.start + row) : rows.data;
#pragma unroll 1
      for (int i = 0; i < kChunksOfThread; ++i) {
        const int chunk = chunk_of(i);
        const bool exists = row < tile.count && chunk * kChunk < head_dim;
        const uint8_t* from = bytes + source.byte_of(chunk * kChunk);
        if (rows.aligned)
          ptx::copy_async_8(address_ + offset(row, chunk), from, exists ? kChunk : 0);
        else if (exists)
          memcpy(at(row, chunk), from, kChunk);
      }
    }
  }

  __device__ __forceinline__ static int swizzle(int row) { return kChunks % 8 == 0 ? row % 8 : row / 2 % 4; }

  unsigned char* data_;
  ptx::SharedAddress address_;
};

// A warp's [16 kM, 8 kN] matrix of sums. Element at[m][n][2 i + j] is row 16 m + lane / 4 + 8 i, column
// 8 n + 2 (lane % 4) + j.
template <int kM, int kN>
struct Fragments {
  float at[kM][kN][4] = {};
};

__device__ __forceinline__ int row_in_fragment(int i) { return lane() / 4 + 8 * i; }
__device__ __forceinline__ int column_in_fragments(int n, int j) { return n * kFragmentColumns + lane() % 4 * 2 + j; }

// sums = a b^T, for 16 kM rows of a, from `row` on, and all rows of b.
template <typename T, int kM, int kN, int kRowsA, int kHeadDim>
__device__ __forceinline__ void multiply_transposed(Fragments<kM, kN>& sums, const SharedTile<T, kRowsA, kHeadDim>& a,
                                                    int row, const SharedTile<T, kN * kFragmentColumns, kHeadDim>& b) {
#pragma unroll 2  // all at once, the offsets of every depth would take registers
  for (int depth = 0; depth < kHeadDim / kFragmentDepth; ++depth) {
    unsigned left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load_left(left[m], row + m * kFragmentRows, depth);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      unsigned right[4];
      b.load_right_transposed(right, n * kFragmentColumns, depth);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::multiply_add<T>(sums.at[m][n], left[m], right);
        ptx::multiply_add<T>(sums.at[m][n + 1], left[m], right + 2);
      }
    }
  }
}

// sums += weights b. The sums that a lane holds of `weights` are what it holds of a left factor.
template <typename T, int kM, int kN, int kD>
__device__ __forceinline__ void add_product(Fragments<kM, kD>& sums, const Fragments<kM, kN>& weights,
                                            const SharedTile<T, kN * kFragmentColumns, kD * kFragmentColumns>& b) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    unsigned left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[m][i] = ptx::pack_pair<T>(weights.at[m][n + i / 2][i % 2 * 2], weights.at[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      unsigned right[4];
      b.load_right(right, n * kFragmentColumns, d / 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::multiply_add<T>(sums.at[m][d], left[m], right);
        ptx::multiply_add<T>(sums.at[m][d + 1], left[m], right + 2);
      }
    }
  }
}

// Calls use(item, stage) for every item that next(item) gives, with the copies that copy(item, stage) asked for in
// place, and after each thread has called decode(item, stage) for what it asked for. Where there are two stages, the
// copies of the next item are under way meanwhile.
template <int kStages, typename Item, typename Next, typename Copy, typename Decode, typename Use>
__device__ __forceinline__ void stream_tiles(const Next& next, const Copy& copy, const Decode& decode, const Use& use) {
  Item ahead{};
  bool more = next(ahead);
  if (more) copy(ahead, 0);
  ptx::commit_copies();
  for (int stage = 0; more; stage = kStages - 1 - stage) {
    ptx::wait_for_copies<0>();
    decode(ahead, stage);
    __syncthreads();  // every thread's copies are there, and the tiles of the item before are used up
    const Item now = ahead;
    if constexpr (kStages == 2) {
      more = next(ahead);
      if (more) copy(ahead, 1 - stage);
      ptx::commit_copies();
    }
    use(now, stage);
    if constexpr (kStages == 1) {
      __syncthreads();  // the tiles are used up
      more = next(ahead);
      if (more) copy(ahead, 0);
      ptx::commit_copies();
    }
  }
  // Where there are no items, what was asked for before them is still on its way, into tiles that others will use.
  ptx::wait_for_copies<0>();
  __syncthreads();
}

// Writes factor * sums to rows of head_dim floats, of which the block has `count`.
template <int kM, int kD>
__device__ __forceinline__ void store_sums(const Fragments<kM, kD>& sums, float factor, float* rows, int32_t count,
                                           int32_t head_dim) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (warp() * kM + m) * kFragmentRows + row_in_fragment(i);
      if (row >= count) continue;
      float* const to = rows + static_cast<int64_t>(row) * head_dim;
#pragma unroll
      for (int d = 0; d < kD; ++d)
        if (d * kFragmentColumns < head_dim)
          *reinterpret_cast<float2*>(to + column_in_fragments(d, 0)) =
              float2{sums.at[m][d][2 * i] * factor, sums.at[m][d][2 * i + 1] * factor};
    }
}

// Writes factor * sums to the rows `start` + 16 kM * warp and following, of which the block has `count`, through the
// rows of `tile` that this warp alone has read.
template <typename T, int kM, int kD, int kRows>
__device__ __forceinline__ void store_rows(const Fragments<kM, kD>& sums, float factor,
                                           const SharedTile<T, kRows, kD * kFragmentColumns>& tile, const Rows<T>& rows,
                                           int32_t start, int32_t count, int32_t head_dim) {
  constexpr int kChunks = SharedTile<T, kRows, kD * kFragmentColumns>::kChunks;
  const int first = warp() * kM * kFragmentRows;
  __syncwarp();  // all lanes have read what is there
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int d = 0; d < kD; ++d)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T* target = tile.at(first + m * kFragmentRows + row_in_fragment(i), d) + lane() % 4 * 2;
        *reinterpret_cast<unsigned*>(target) =
            ptx::pack_pair<T>(sums.at[m][d][2 * i] * factor, sums.at[m][d][2 * i + 1] * factor);
      }
  __syncwarp();
  for (int index = lane(); index < kM * kFragmentRows * kChunks; index += kWarpSize) {
    const int row = first + index / kChunks, chunk = index % kChunks;
    if (row < count && chunk * kChunk < head_dim)
      ptx::store_vector(rows.at(start + row) + chunk * kChunk, *reinterpret_cast<const uint4*>(tile.at(row, chunk)),
                        rows.aligned);
  }
}

}  // namespace selfforcing::attention_cuda
