// Tiles of bfloat16 and float16 attention on Hopper's own instructions (sm_90a): the copy engine (TMA) brings rows of
// heads and of pages to shared memory, where products of warpgroups (wgmma) read them; no thread moves an element.
#pragma once
#include "../ptx/bulk_copy.cuh"
#include "../ptx/warpgroup.cuh"
#include "cuda_hopper_fit.h"
#include "cuda_mma_tiles.cuh"

namespace selfforcing::attention_cuda {

constexpr int kWarpgroupWarps = 4;
constexpr int kWarpgroupThreads = kWarpgroupWarps * kWarpSize;
constexpr int kWarpgroupRows = kWarpgroupWarps * kFragmentRows;

__device__ __forceinline__ int warpgroup() { return static_cast<int>(threadIdx.x / kWarpgroupThreads); }

// A thread block of `kConsumerGroups` warpgroups that multiply and one before them, the producer, of which one warp
// asks for copies, or all four also decode. Every thread starts with as many registers as all could have; then they go
// where they are needed.
template <int kConsumerGroups, bool kDecodes = false>
struct HopperBlock {
  static constexpr int kConsumers = kConsumerGroups, kConsumerThreads = kConsumers * kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroupWarps;
  static constexpr int kThreads = kWarpgroupThreads + kConsumerThreads;
  static constexpr int kProducerWarps = kDecodes ? kWarpgroupWarps : 1;
  static constexpr int kProducerRegisters = kDecodes ? 136 : kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kDecodes ? 184 : kConsumers == 2 ? 240 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * (65536 / kThreads / 8 * 8));

  // Whether a warp of the producer is the one that speaks for it.
  __device__ __forceinline__ static bool leads() { return kProducerWarps == 1 || warp() == 0; }

  // produce() by the producer's warps, consume(number of the warpgroup) by the others.
  template <typename Produce, typename Consume>
  __device__ __forceinline__ static void run(const Produce& produce, const Consume& consume) {
    if (warpgroup() == 0) {
      ptx::release_registers<kProducerRegisters>();
      if (warp() < kProducerWarps) produce();
    } else {
      ptx::take_registers<kConsumerRegisters>();
      consume(warpgroup() - 1);
    }
  }
};

// What this thread block of a grid as large as the GPU works on in its n-th round. Serpentine: who had the longest work
// of one round has the shortest of the next.
__device__ __forceinline__ int32_t item_of_round(int32_t round) {
  const int32_t block = static_cast<int32_t>(blockIdx.x), blocks = static_cast<int32_t>(gridDim.x);
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// ---- Shared memory

// Rows in shared memory as copies leave them: panels as wide as their swizzle, one after the other. `data` is aligned
// to kAlignment.
template <typename T, int kTileRows, int kHeadDim>
class HopperTile {
 public:
  static constexpr int kRows = kTileRows, kColumns = kHeadDim;
  static constexpr ptx::Swizzle kSwizzle = kHeadDim % 64 == 0 ? ptx::Swizzle::bytes128 : ptx::Swizzle::bytes64;
  static constexpr int kRowBytes = ptx::row_bytes(kSwizzle);  // of a panel
  static constexpr int kPanelColumns = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kSwizzledRows = 8;  // then the pattern repeats
  static constexpr int kAlignment = kSwizzledRows * kRowBytes;
  static_assert(kPanels * kPanelColumns == kHeadDim && kRows % kSwizzledRows == 0);

  __device__ __forceinline__ explicit HopperTile(unsigned char* data) : data_(data) {}

  // One thread asks for rows of a head of a stream (`map` from encode_heads) or of a page (from encode_pages), from
  // `row` on. They become rows `tile_row` and following, a multiple of 8, of the tile; as many as the map's box has.
  // Rows beyond the tensor and columns beyond its head dim become zero.
  __device__ __forceinline__ void load(const ptx::TensorMap& map, ptx::SharedAddress barrier, int tile_row, int32_t row,
                                       int32_t head, int32_t stream_or_page) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::load_tile(ptx::shared_address(data_ + panel * kPanelBytes + tile_row * kRowBytes), map, barrier,
                     panel * kPanelColumns, head, row, stream_or_page);
  }

  // Where 16 bytes of a row are, for ordinary stores. Products may read them after fence_async_proxy() and a barrier.
  __device__ __forceinline__ uint4* chunk(int row, int chunk) const {
    constexpr int kChunks = kRowBytes / 16;
    const int offset = ptx::swizzled(kSwizzle, row * kRowBytes + chunk % kChunks * 16);
    return reinterpret_cast<uint4*>(data_ + chunk / kChunks * kPanelBytes + offset);
  }

  // Makes rows [row, end) zero, `threads` threads together, of which this is number `thread`. Ordinary stores, too.
  __device__ __forceinline__ void clear(int row, int end, int thread, int threads) const {
    const int bytes = (end - row) * kRowBytes;  // the swizzle stays in a row
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll 1
      for (int offset = thread * 16; offset < bytes; offset += threads * 16)
        *reinterpret_cast<uint4*>(data_ + panel * kPanelBytes + row * kRowBytes + offset) = uint4{0, 0, 0, 0};
  }

  // As a factor whose rows are m or n, and whose columns are summed over: rows from `row` on, a multiple of 8, and 16
  // columns.
  __device__ __forceinline__ ptx::MatrixDescriptor rows_factor(int row = 0) const {
    return ptx::matrix_descriptor(ptx::shared_address(data_ + row * kRowBytes), 0, kAlignment, kSwizzle);
  }
  __device__ __forceinline__ static constexpr int bytes_to_columns(int depth) {
    const int column = depth * kFragmentDepth;
    return column / kPanelColumns * kPanelBytes + column % kPanelColumns * static_cast<int>(sizeof(T));
  }

  // Transposed, as a factor whose columns are m or n, and whose rows are summed over: columns from panel `panel` on,
  // and 16 rows.
  __device__ __forceinline__ ptx::MatrixDescriptor columns_factor(int panel = 0) const {
    return ptx::matrix_descriptor(ptx::shared_address(data_ + panel * kPanelBytes), kPanelBytes, kAlignment, kSwizzle);
  }
  __device__ __forceinline__ static constexpr int bytes_to_rows(int depth) {
    return depth * kFragmentDepth * kRowBytes;
  }

 private:
  unsigned char* data_;
};

// ---- Products. A warpgroup's sums [64, N] are float[N / 2], laid out like a warp's Fragments<1, N / 8> (see
// csrc/ptx/warpgroup.cuh).

// Asks for sums = a b^T: 64 rows of a from `row` on, all rows of b.
template <typename T, int kRowsA, int kRowsB, int kHeadDim>
__device__ __forceinline__ void multiply_transposed(float (&sums)[kRowsB / 2], const HopperTile<T, kRowsA, kHeadDim>& a,
                                                    int row, const HopperTile<T, kRowsB, kHeadDim>& b) {
  const ptx::MatrixDescriptor left = a.rows_factor(row), right = b.rows_factor();
#pragma unroll
  for (int depth = 0; depth < kHeadDim / kFragmentDepth; ++depth)
    ptx::multiply_add_shared<T, kRowsB, false, false>(sums, left.advanced(a.bytes_to_columns(depth)),
                                                      right.advanced(b.bytes_to_columns(depth)), depth > 0);
}

// Sums, rounded, as a left factor in registers.
template <int kColumns>
using RegisterFactor = unsigned[kColumns / kFragmentDepth][4];

template <typename T, int kDepths>
__device__ __forceinline__ void round_sums(unsigned (&factor)[kDepths][4], const float (&sums)[8 * kDepths]) {
#pragma unroll
  for (int depth = 0; depth < kDepths; ++depth)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      factor[depth][i] = ptx::pack_pair<T>(sums[8 * depth + 2 * i], sums[8 * depth + 2 * i + 1]);
  ptx::hold_factor(factor);
}

// Asks for sums += factor b, for as many rows of b, from `row` on, as the factor has columns.
template <typename T, int kDepths, int kRows, int kHeadDim>
__device__ __forceinline__ void add_product(float (&sums)[kHeadDim / 2], const unsigned (&factor)[kDepths][4],
                                            const HopperTile<T, kRows, kHeadDim>& b, int row = 0) {
  const ptx::MatrixDescriptor right = b.columns_factor();
#pragma unroll
  for (int depth = 0; depth < kDepths; ++depth)
    ptx::multiply_add_registers<T, kHeadDim, true>(sums, factor[depth],
                                                   right.advanced(b.bytes_to_rows(row / kFragmentDepth + depth)), true);
}

// ---- Buffers that go from a producer to consumers and back

// Barriers of kStages buffers: `full` ends a phase when a buffer's copies are there, `empty` when its consumers have
// read it.
template <int kStages>
struct BufferBarriers {
  uint64_t full[kStages], empty[kStages];

  // By one thread, before fence_barrier_init() and a barrier of the block. `consumers`: how many times a buffer is
  // released; `producers`: how many arrivals fill it.
  __device__ __forceinline__ void init(int consumers, int producers = 1) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&full[stage]), producers);
      ptx::barrier_init(ptx::shared_address(&empty[stage]), consumers);
    }
  }
};

// Which use of kStages buffers, that take turns, is the next one. A buffer that was never used is empty.
template <int kStages>
struct BufferPosition {
  static_assert((kStages & (kStages - 1)) == 0, "a division would take registers");
  unsigned use = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(use % kStages); }
  __device__ __forceinline__ unsigned parity() const { return use / kStages % 2; }
  __device__ __forceinline__ ptx::SharedAddress full(BufferBarriers<kStages>& barriers) const {
    return ptx::shared_address(&barriers.full[stage()]);
  }
  __device__ __forceinline__ void wait_full(BufferBarriers<kStages>& barriers) const {
    ptx::barrier_wait(full(barriers), parity());
  }
  // By all lanes of a producer's warp: none of them may be late when another fills the buffer.
  __device__ __forceinline__ void wait_empty(BufferBarriers<kStages>& barriers) const {
    ptx::barrier_wait(ptx::shared_address(&barriers.empty[stage()]), parity() ^ 1);
    __syncwarp();
  }
  // By all lanes of a warp that has read the buffer: each of a consumer's warps says so.
  __device__ __forceinline__ void release(BufferBarriers<kStages>& barriers) const {
    __syncwarp();
    if (lane() == 0) ptx::barrier_arrive(ptx::shared_address(&barriers.empty[stage()]));
  }
};

// Warpgroups that multiply in turns, one after the other, so that the tensor cores work for one while the others do
// something else. All of them take equally many turns.
template <int kGroups>
class Turns {
 public:
  static constexpr int kFirstBarrier = 1;  // the first named barrier that is taken; as many follow as there are groups

  // `group` counts from 0.
  __device__ __forceinline__ explicit Turns(int group) : group_(group) {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait() const {
    ptx::named_barrier_sync(kFirstBarrier + group_, 2 * kWarpgroupThreads);
  }
  __device__ __forceinline__ void pass() const {
    ptx::named_barrier_arrive(kFirstBarrier + (group_ + 1) % kGroups, 2 * kWarpgroupThreads);
  }
  // After the last turn: the one that was passed to the first group is taken.
  __device__ __forceinline__ void finish() const {
    if (group_ == 0) wait();
  }

 private:
  int group_;
};

// ---- Tensor maps: parameters of a kernel, made on the host for every call, so that a captured graph holds them.

// Boxes of kRows rows, or of `box_rows`, as HopperTile::load takes them. Heads are [num_streams, num_rows, num_heads,
// head_dim]; dimensions come in the order in which the strides of such a tensor grow. Without rows nothing is ever
// loaded, and the map stays empty.
template <typename Tile, typename Pointer>
int32_t encode_heads(ptx::TensorMap& map, const Heads<Pointer>& tensor, int32_t num_streams, int32_t num_rows,
                     int32_t num_heads, int32_t head_dim, int32_t box_rows = Tile::kRows) {
  if (num_rows == 0) return 0;
  constexpr int64_t kElementBytes = Tile::kRowBytes / Tile::kPanelColumns;
  return ptx::encode_tensor_map(
      map, kElementBytes, tensor.data, {head_dim, num_heads, num_rows, num_streams},
      {tensor.head_stride * kElementBytes, tensor.token_stride * kElementBytes, tensor.batch_stride * kElementBytes},
      {Tile::kPanelColumns, 1, box_rows, 1}, Tile::kSwizzle);
}

}  // namespace selfforcing::attention_cuda
