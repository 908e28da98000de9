// Keys and values as the tiles of attention take them, from where they are: a tensor, pages that hold elements, or
// pages that hold something else. A tile of the latter reaches shared memory as it is stored and is decoded there, in
// place, by the threads that asked for it: nothing waits in registers, and no copy at full precision is ever in device
// memory.
//
// Every thread moves pieces of one vector, kVector<T> channels of a row: 16 bytes in shared memory. Quantised pages
// fill the first kVector<T> bytes of them at first.
#pragma once
#include "../rope/cuda_angles.cuh"
#include "cuda_rows.cuh"

namespace selfforcing::attention_cuda {

// Four bytes or half-bytes of `word` as the numbers that they stand for, times `scale`, a bfloat16: exact. Channels
// come as in PageFormat::int4: `high` is whether they are the high bits.
__device__ __forceinline__ void decode_word(PageFormat format, unsigned word, bool high, float scale, float* values) {
  if (format == PageFormat::fp8_e4m3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Exponent and fraction at the places of a float's, whose exponent counts from 127 instead of 7.
      const unsigned bits = static_cast<unsigned>(static_cast<int>(word << (24 - 8 * i)) >> 4) & 0x87f00000u;
      float small;
      memcpy(&small, &bits, sizeof(small));
      values[i] = small * 0x1p120f * scale;
    }
    return;
  }
  const bool halves = format == PageFormat::int4;
  const unsigned biased = halves ? (word >> (high ? 4 : 0)) & 0x0f0f0f0fu : word ^ 0x80808080u;
  const float offset = (-0x1p15f - (halves ? 8.0f : 128.0f)) * scale;  // exact: 13 or 9 bits times 8
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const unsigned bits = ptx::select_bytes(biased, 0x47000000u, 0x7404u | i << 4);  // as a float: 2^15 + byte
    float sum;
    memcpy(&sum, &bits, sizeof(sum));
    values[i] = fmaf(sum, scale, offset);
  }
}

// What decoding needs to know of a row.
struct StoredRow {
  const uint16_t* scales = nullptr;  // of quantised rows
  TokenAngles angles;                // of rotated ones
};

// The keys, or the values, of one head of one stream.
template <typename T>
struct KeySource {
  static constexpr int kWidth = kVector<T>;

  const AttentionParams& params;
  int32_t stream, kv_head;
  bool values;

  __device__ __forceinline__ bool quantised(const ColumnTile& tile) const {
    return tile.in_past() && params.past.format != PageFormat::elements;
  }
  __device__ __forceinline__ bool rotated(const ColumnTile& tile) const {
    return tile.in_past() && !values && params.past.rope_table != nullptr;
  }
  // Whether what is in memory is not what the products take.
  __device__ __forceinline__ bool coded(const ColumnTile& tile) const { return quantised(tile) || rotated(tile); }

  // Rows of elements, of tiles that are not quantised.
  __device__ __forceinline__ Rows<const T> rows(const ColumnTile& tile) const {
    return tile.in_past() ? paged_rows<T>(params.past, values, stream, kv_head)
                          : head_rows<const T>(values ? params.v : params.k, stream, kv_head);
  }
  // Rows of bytes, of quantised tiles, and where a vector that starts at `channel` is in such a row.
  __device__ __forceinline__ Rows<const uint8_t> bytes() const {
    return paged_rows<uint8_t, kWidth>(params.past, values, stream, kv_head);
  }
  __device__ __forceinline__ static int byte_of(PageFormat format, int channel) {
    constexpr int kHalf = kInt4Group / 2;
    return format == PageFormat::int4 ? channel / kInt4Group * kHalf + channel % kHalf : channel;
  }
  __device__ __forceinline__ int byte_of(int channel) const { return byte_of(params.past.format, channel); }

  // Added to the scores of a tile; the second in units of log2.
  __device__ __forceinline__ float bias(const ColumnTile& tile) const {
    return tile.in_past() ? span_of(tile).bias : 0.0f;
  }
  __device__ __forceinline__ float bias_log2(const ColumnTile& tile) const { return bias(tile) * kLog2E; }
  // Of row `row` of a rotated tile.
  __device__ __forceinline__ TokenAngles angles(const ColumnTile& tile, int row) const {
    const RopeAxes& axes = params.past.rope_axes;
    const int32_t token = span_of(tile).token + (tile.start - span_of(tile).start) + row;
    return TokenAngles(axes, params.past.rope_table, token, axes.size[0]);
  }
  // Where row `row` of a tile of the past is.
  __device__ __forceinline__ PagePlace place(const ColumnTile& tile, int row) const {
    const PagedPast& past = params.past;
    return place_in_pages(past.page_table + stream * past.table_stride, past.page_size, tile.start + row);
  }
  // Of a quantised row, and which of them belongs to the vector that starts at `channel`.
  __device__ __forceinline__ const uint16_t* scales(const PagePlace& place) const {
    const PagedPast& past = params.past;
    const int64_t row = (place.page * past.page_size + place.offset) * params.num_kv_heads + kv_head;
    const int groups = past.format == PageFormat::int4 ? params.head_dim / kInt4Group : 1;
    return (values ? past.v_scales : past.k_scales) + row * groups;
  }
  __device__ __forceinline__ static int scale_of(PageFormat format, int channel) {
    return format == PageFormat::int4 ? channel / kInt4Group : 0;
  }
  // Of row `row` of a coded tile.
  __device__ __forceinline__ StoredRow stored_row(const ColumnTile& tile, int row) const {
    StoredRow stored;
    if (quantised(tile)) stored.scales = scales(place(tile, row));
    if (rotated(tile)) stored.angles = angles(tile, row);
    return stored;
  }

  // The vector that starts at `channel` of a quantised row, not rotated; `scale` is a bfloat16.
  __device__ __forceinline__ void dequantise(PageFormat format, uint4 bits, uint16_t scale, int channel,
                                             float (&x)[kWidth]) const {
    unsigned words[4];
    memcpy(words, &bits, sizeof(words));
    const unsigned scale_bits = static_cast<unsigned>(scale) << 16;
    float factor;
    memcpy(&factor, &scale_bits, sizeof(factor));
    const bool high = channel % kInt4Group >= kInt4Group / 2;
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) decode_word(format, words[i], high, factor, x + 4 * i);
    if (values || params.past.k_offset == nullptr) return;
    const float* offset = params.past.k_offset + static_cast<int64_t>(kv_head) * params.head_dim + channel;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] += __ldg(offset + i);
  }

  // What the products take, of the vector that starts at `channel` of a row of a coded tile.
  __device__ __forceinline__ uint4 decode(uint4 bits, const ColumnTile& tile, const StoredRow& row, int channel) const {
    float x[kWidth];
    if (quantised(tile)) {
      const PageFormat format = params.past.format;
      dequantise(format, bits, __ldg(row.scales + scale_of(format, channel)), channel, x);
    } else {
      ptx::unpack<T>(bits, x);
    }
    if (rotated(tile)) row.angles.rotate(x, channel);
    return ptx::pack<T>(x);
  }

 private:
  __device__ __forceinline__ const PastSpan& span_of(const ColumnTile& tile) const {
    return params.past.spans_of(stream, kv_head)[tile.span];
  }
};

// Adds to the pages of gradients what belongs to channels [channel, channel + kWidth) of row `row` of a tile of the
// past.
template <typename T, int kWidth>
__device__ __forceinline__ void add_past_gradient(const AttentionBackwardParams& params, const KeySource<T>& source,
                                                  const ColumnTile& keys, int row, int channel,
                                                  const float (&grads_of_operand)[kWidth]) {
  const PagedPast& past = params.past;
  const PagePlace place = place_in_pages(params.past_grads.page_table + source.stream * past.table_stride,
                                         past.page_size, keys.start + row);
  if (place.page < 0) return;
  float grads[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) grads[i] = grads_of_operand[i];
  if (source.rotated(keys)) source.angles(keys, row).rotate(grads, channel, true);
  const int64_t row_in_pages = (place.page * past.page_size + place.offset) * params.num_kv_heads + source.kv_head;
  float* const sums = (source.values ? params.past_grads.v_pages : params.past_grads.k_pages) +
                      row_in_pages * params.head_dim + channel;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] += grads[i];
}

}  // namespace selfforcing::attention_cuda
