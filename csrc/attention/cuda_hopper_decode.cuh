// Tiles of a past whose pages hold something else than what products take: quantised keys and values, keys that are
// rotated when they are read. The four warps of a producer's warpgroup read rows of pages into registers, decode them,
// and write them to buffers as copies would. The rows of a tile are asked for while the tile before is decoded, so that
// nobody waits for memory, and what is not decoded never takes room or bandwidth of shared memory.
#pragma once
#include <type_traits>

#include "cuda_hopper_keys.cuh"

namespace selfforcing::attention_cuda {

// Fills buffers of type Tile, by all threads of the first warpgroup, which meet at named barrier kBarrier. Four threads
// have a row, each every fourth 16-byte chunk: where the row lies has to be found once for them all.
template <typename T, typename Tile, PageFormat kFormat, int kBarrier>
class TileDecoder {
 public:
  __device__ __forceinline__ TileDecoder(const AttentionParams& params, const KeyMaps& maps)
      : params_(params), maps_(maps) {}

  // From here on tiles of this head; the first one.
  __device__ __forceinline__ void start(int32_t stream, int32_t kv_head, const ColumnTile& tile) {
    stream_ = stream, kv_head_ = kv_head;
    ahead_ = tile;
    if (!tile.in_past()) return;
    place_ = find_row(tile);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) ask<false>(tile, pass);
  }

  // On to the next tile; `ahead` is the one after it, in no past where there is none.
  __device__ __forceinline__ void advance(const ColumnTile& ahead) {
    now_ = ahead_;
    ahead_ = ahead;
  }

  // Fills an empty buffer with the keys of the tile, then one with its values. `full` ends its phase when it is there.
  template <bool kValues>
  __device__ __forceinline__ void fill(const Tile& to, ptx::SharedAddress full) {
    constexpr bool kValuesAreNext = kQuantised && !kValues;
    const ColumnTile& next = kValuesAreNext ? now_ : ahead_;
    const bool decodes = now_.in_past() && (kQuantised || !kValues);
    if (decodes) {
      if (!kValuesAreNext) place_ = find_row(next);
      const int first = first_row(maps_, now_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        store<kValues>(pass, first, to);
        if (next.in_past()) ask<kValuesAreNext>(next, pass);
      }
      ptx::fence_async_proxy();
    }
    // Everybody's rows are there. And nobody is left waiting for an empty buffer that may be filled twice meanwhile.
    ptx::named_barrier_sync(kBarrier, kWarpgroupThreads);
    if (warp() != 0) return;
    if (!decodes)
      load_keys(params_, maps_, now_, stream_, kv_head_, kValues, to, full);
    else if (lane() == 0)
      ptx::barrier_arrive(full);
  }

 private:
  static constexpr bool kQuantised = kFormat != PageFormat::elements;
  using Word = std::conditional_t<kQuantised, uint2, uint4>;  // a chunk as it is stored

  static constexpr int kRowThreads = 4, kWarpRows = kWarpSize / kRowThreads;
  static constexpr int kPassRows = kWarpgroupWarps * kWarpRows, kPasses = Tile::kRows / kPassRows;
  static constexpr int kChunksOfThread = Tile::kColumns / kChunk / kRowThreads;
  static constexpr int kScales = kFormat == PageFormat::int4 ? kChunksOfThread : 1;
  static_assert(kPasses * kPassRows == Tile::kRows && kChunksOfThread * kRowThreads * kChunk == Tile::kColumns);
  static_assert(kPasses * kWarpRows <= kWarpSize, "a lane knows of one row");

  // Where a row lies, in as few registers as that takes.
  struct RowPlace {
    int32_t page = 0;
    uint32_t offset = 0;
  };

  template <bool kValues>
  __device__ __forceinline__ KeySource<T> source() const {
    return {params_, stream_, kv_head_, kValues};
  }

  // The row of the index-th four threads of this warp. Two of them store at once: they must not have the same banks,
  // which rows of 128 bytes have that lie next to each other.
  __device__ __forceinline__ static int row_of(int pass, int index) {
    if constexpr (Tile::kSwizzle == ptx::Swizzle::bytes128) index = index / 2 + index % 2 * (kWarpRows / 2);
    return pass * kPassRows + warp() * kWarpRows + index;
  }
  __device__ __forceinline__ static int row_of(int pass) { return row_of(pass, lane() / kRowThreads); }
  __device__ __forceinline__ static int chunk_of(int i) { return lane() % kRowThreads + i * kRowThreads; }

  // Every lane looks one row of its warp up.
  __device__ __forceinline__ RowPlace find_row(const ColumnTile& tile) const {
    const int row = row_of(lane() / kWarpRows, lane() % kWarpRows);
    if (!tile.in_past() || row >= tile.count) return {};
    const PagePlace place = source<false>().place(tile, row);
    return {static_cast<int32_t>(place.page), place.offset};
  }

  template <bool kValues>
  __device__ __forceinline__ void ask(const ColumnTile& tile, int pass) {
    const int knows = pass * kWarpRows + lane() / kRowThreads;
    const PagePlace place{__shfl_sync(kFullWarp, place_.page, knows), __shfl_sync(kFullWarp, place_.offset, knows)};
    if (row_of(pass) >= tile.count) return;
    const KeySource<T> from = source<kValues>();
    if constexpr (kQuantised) {
      const uint8_t* const bytes = from.bytes().at(place);
      const uint16_t* const scales = from.scales(place);
#pragma unroll
      for (int i = 0; i < kChunksOfThread; ++i)
        if (exists(i)) words_[pass][i] = ptx::load_once<Word>(bytes + from.byte_of(kFormat, chunk_of(i) * kChunk));
#pragma unroll
      for (int i = 0; i < kScales; ++i)
        if (exists(i)) scales_[pass][i] = __ldg(scales + from.scale_of(kFormat, chunk_of(i) * kChunk));
    } else {
      const T* const elements = from.rows(tile).at(place);
#pragma unroll
      for (int i = 0; i < kChunksOfThread; ++i)
        if (exists(i)) words_[pass][i] = ptx::load_once<Word>(elements + chunk_of(i) * kChunk);
    }
  }

  // Of what was asked for; columns beyond the head become zero.
  template <bool kValues>
  __device__ __forceinline__ void store(int pass, int first, const Tile& to) const {
    const int row = row_of(pass);
    if (row >= now_.count) return;
    const KeySource<T> from = source<kValues>();
    const bool rotated = !kQuantised || from.rotated(now_);  // the one reason to decode elements
    TokenAngles angles;
    if (rotated) angles = from.angles(now_, row);
#pragma unroll
    for (int i = 0; i < kChunksOfThread; ++i) {
      uint4 bits{0, 0, 0, 0};
      if (exists(i)) {
        float x[kChunk];
        const Word word = words_[pass][i];
        if constexpr (kQuantised)
          from.dequantise(kFormat, uint4{word.x, word.y, 0, 0}, scales_[pass][i % kScales], chunk_of(i) * kChunk, x);
        else
          ptx::unpack<T>(word, x);
        if (rotated) angles.rotate(x, chunk_of(i) * kChunk);
        bits = ptx::pack<T>(x);
      }
      *to.chunk(first + row, chunk_of(i)) = bits;
    }
  }
  __device__ __forceinline__ bool exists(int i) const { return chunk_of(i) * kChunk < params_.head_dim; }

  const AttentionParams& params_;
  const KeyMaps& maps_;
  int32_t stream_ = 0, kv_head_ = 0;
  ColumnTile now_{}, ahead_{};
  RowPlace place_;                        // of the tile that is asked for
  Word words_[kPasses][kChunksOfThread];  // of the tile that is decoded next
  uint16_t scales_[kPasses][kScales];
};

// Calls call(std::integral_constant<PageFormat, format>).
template <typename Call>
__device__ __forceinline__ void with_format(PageFormat format, const Call& call) {
  switch (format) {
    case PageFormat::elements: return call(std::integral_constant<PageFormat, PageFormat::elements>{});
    case PageFormat::int8: return call(std::integral_constant<PageFormat, PageFormat::int8>{});
    case PageFormat::fp8_e4m3: return call(std::integral_constant<PageFormat, PageFormat::fp8_e4m3>{});
    case PageFormat::int4: return call(std::integral_constant<PageFormat, PageFormat::int4>{});
  }
}

}  // namespace selfforcing::attention_cuda
