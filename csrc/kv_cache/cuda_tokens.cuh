// Writing the keys or values of a token into its page on the GPU, for the kernels that do.
#pragma once
#include <float.h>

#include "../ptx/elements.cuh"
#include "params.h"

namespace selfforcing {

// Where a token goes.
struct PageSlot {
  int64_t page;
  int32_t offset;

  __device__ __forceinline__ PageSlot(const KVCacheWriteParams& params, int64_t stream, int32_t token) {
    const int32_t position = params.write_start[stream] + token, entry = position / params.page_size;
    page = params.page_table[stream * params.table_stride + entry];
    offset = position - entry * params.page_size;
  }

  // In elements as stored, from the start of the pages.
  __device__ __forceinline__ int64_t row(int64_t page_stride, int64_t token_stride) const {
    return page * page_stride + offset * token_stride;
  }
};

// ---- Quantised: some lanes of a warp share a token's head

constexpr int kQuantisedWidth = 8;                           // channels of a lane: 8 bytes of a page, 16 of most inputs
constexpr int kLanesOfGroup = kInt4Group / kQuantisedWidth;  // that share a scale of int4
constexpr int kNarrowLanes = 16, kNarrowHead = kNarrowLanes * kQuantisedWidth;

// Lanes that share a head: half a warp where that is enough.
constexpr int lanes_of_head(int32_t head_dim) { return head_dim <= kNarrowHead ? kNarrowLanes : ptx::kWarpSize; }

__device__ __forceinline__ unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
__device__ __forceinline__ float float_of(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The bfloat16 scale of elements of which these are the bits of the largest magnitude.
__device__ __forceinline__ uint16_t scale_bits(unsigned amax_bits, PageFormat format) {
  constexpr unsigned kInfinityBits = 0x7f800000u;
  constexpr uint16_t kNaNScale = 0x7fc0;
  if (amax_bits >= kInfinityBits) return kNaNScale;
  const float largest = format == PageFormat::int8 ? 127.0f : format == PageFormat::int4 ? 7.0f : 448.0f;
  const float exact = float_of(amax_bits) / largest;
  return exact < FLT_MIN ? 0 : static_cast<uint16_t>((bits_of(exact) + 0xffffu) >> 16);
}

// An element's bits, lowest first; int4: value + 8.
__device__ __forceinline__ unsigned quantise(float quotient, PageFormat format) {
  if (format == PageFormat::fp8_e4m3) {
    constexpr unsigned kRebias = (127 - 7) << 3;         // what the exponents differ by, above three bits
    constexpr unsigned kLeastNormal = (127u - 6) << 23;  // 2^-6
    const unsigned bits = bits_of(quotient), magnitude = bits & 0x7fffffffu;
    const unsigned normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - kRebias;
    // Below 2^-6 the last place is 2^-9, as it is of float32 numbers from 2^14 on.
    const unsigned subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    return (magnitude < kLeastNormal ? subnormal : normal) | (bits >> 24 & 0x80u);
  }
  const unsigned nearest = bits_of(quotient + 0x1.8p23f);  // the nearest integer is in its low bits
  return format == PageFormat::int4 ? (nearest + 8u) & 0xfu : nearest & 0xffu;
}

// A lane's channels [c, c + kQuantisedWidth) of a head, without the offset; 0 beyond head_dim.
template <typename T>
__device__ __forceinline__ void load_shifted(const T* x, const float* offset, int32_t c, int32_t head_dim, bool wide,
                                             float (&values)[kQuantisedWidth]) {
  if (wide && c < head_dim) {
    ptx::load_elements<T>(x + c, values);
  } else {
#pragma unroll
    for (int i = 0; i < kQuantisedWidth; ++i) values[i] = c + i < head_dim ? ptx::to_float(x[c + i]) : 0.0f;
  }
  if (offset == nullptr) return;
#pragma unroll
  for (int i = 0; i < kQuantisedWidth; ++i)
    if (c + i < head_dim) values[i] -= offset[c + i];
}

// As bits, in which a NaN is larger than all numbers; the largest of `lanes` lanes.
__device__ __forceinline__ unsigned largest_magnitude(const float (&values)[kQuantisedWidth], unsigned largest,
                                                      int lanes) {
#pragma unroll
  for (int i = 0; i < kQuantisedWidth; ++i) largest = max(largest, bits_of(values[i]) & 0x7fffffffu);
  for (lanes /= 2; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(ptx::kFullWarp, largest, lanes));
  return largest;
}

// Writes a lane's elements where its channels [c, c + kQuantisedWidth) belong, in `row`.
__device__ __forceinline__ void store_quantised(uint8_t* row, int32_t c, int32_t head_dim, bool wide, PageFormat format,
                                                uint16_t scale, const float (&values)[kQuantisedWidth]) {
  const float divisor = float_of(static_cast<unsigned>(scale) << 16);
  unsigned words[2] = {};
#pragma unroll
  for (int i = 0; i < kQuantisedWidth; ++i)
    words[i / 4] |= quantise(divisor > 0.0f ? values[i] / divisor : 0.0f, format) << i % 4 * 8;
  int32_t byte = c, count = min(kQuantisedWidth, head_dim - c);
  if (format == PageFormat::int4) {
    // The high half of a byte is two lanes further: that of the lanes that then have nothing to write.
#pragma unroll
    for (int i = 0; i < 2; ++i) words[i] |= __shfl_xor_sync(ptx::kFullWarp, words[i], kLanesOfGroup / 2) << 4;
    if (c % kInt4Group >= kInt4Group / 2) count = 0;
    byte = c / kInt4Group * (kInt4Group / 2) + c % kInt4Group;
  }
  if (count <= 0) return;
  if (wide)
    *reinterpret_cast<uint2*>(row + byte) = {words[0], words[1]};
  else
#pragma unroll
    for (int i = 0; i < kQuantisedWidth; ++i)
      if (i < count) row[byte + i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
}

// Writes a head of a token's keys or values, which `lanes` lanes share; this is number `lane` of them. All lanes of a
// warp come along, also those whose head does not exist: shuffles want them all. `wide`: a lane's channels and bytes
// may be accessed together.
template <typename T>
__device__ __forceinline__ void quantise_head(const KVCacheWriteParams& params, bool is_values, const PageSlot& slot,
                                              int64_t stream, int32_t token, int32_t head, bool exists, int lane,
                                              int lanes, bool wide) {
  const bool grouped = params.format == PageFormat::int4;
  const T* x = static_cast<const T*>(is_values ? params.v.data : params.k.data) +
               stream * (is_values ? params.v.batch_stride : params.k.batch_stride) +
               token * (is_values ? params.v.token_stride : params.k.token_stride) +
               head * (is_values ? params.v.head_stride : params.k.head_stride);
  uint8_t* row = static_cast<uint8_t*>(is_values ? params.v_pages : params.k_pages) +
                 slot.row(is_values ? params.v_page_stride : params.k_page_stride,
                          is_values ? params.v_token_stride : params.k_token_stride) +
                 head * (is_values ? params.v_head_stride : params.k_head_stride);
  uint16_t* scales = (is_values ? params.v_scales : params.k_scales) +
                     ((slot.page * params.page_size + slot.offset) * params.num_kv_heads + head) *
                         (grouped ? params.head_dim / kInt4Group : 1);
  const float* offset = is_values || params.k_offset == nullptr
                            ? nullptr
                            : params.k_offset + static_cast<int64_t>(head) * params.head_dim;
  const int32_t head_dim = exists ? params.head_dim : 0;

  // A second look at the channels is at what the first one left in the first-level cache.
  float values[kQuantisedWidth];
  unsigned amax = 0;
  if (!grouped)
    for (int32_t first = 0; first < params.head_dim; first += lanes * kQuantisedWidth) {
      load_shifted(x, offset, first + lane * kQuantisedWidth, head_dim, wide, values);
      amax = largest_magnitude(values, amax, lanes);
    }
  for (int32_t first = 0; first < params.head_dim; first += lanes * kQuantisedWidth) {
    const int32_t c = first + lane * kQuantisedWidth;
    load_shifted(x, offset, c, head_dim, wide, values);
    const uint16_t scale = scale_bits(grouped ? largest_magnitude(values, 0, kLanesOfGroup) : amax, params.format);
    store_quantised(row, c, head_dim, wide, params.format, scale, values);
    if (c < head_dim && c % (grouped ? kInt4Group : params.head_dim) == 0) scales[grouped ? c / kInt4Group : 0] = scale;
  }
}

template <typename T>
bool is_quantised_wide(const ConstHeads& tokens, const void* pages, int64_t page_stride, int64_t token_stride,
                       int64_t head_stride) {
  return ptx::wide_access<T>(tokens.data, tokens.batch_stride, tokens.token_stride, tokens.head_stride) &&
         (reinterpret_cast<intptr_t>(pages) | page_stride | token_stride | head_stride) % kQuantisedWidth == 0;
}

// Whether quantise_head may be told so.
template <typename T>
bool quantises_wide(const KVCacheWriteParams& params) {
  return params.head_dim % kQuantisedWidth == 0 &&
         is_quantised_wide<T>(params.k, params.k_pages, params.k_page_stride, params.k_token_stride,
                              params.k_head_stride) &&
         is_quantised_wide<T>(params.v, params.v_pages, params.v_page_stride, params.v_token_stride,
                              params.v_head_stride);
}

}  // namespace selfforcing
