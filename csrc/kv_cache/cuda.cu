// Writing a block's keys and values into pages: of elements, a copy, 16 bytes per thread, that moves bits and does not
// look at them; quantised, a pass in which some lanes of a warp share a token's head.
#include <float.h>

#include "../ptx/elements.cuh"
#include "../ptx/launch.cuh"
#include "params.h"

namespace selfforcing {
namespace {

constexpr int kThreads = 256;

// ---- Elements

// Sixteen bytes where both sides allow it, else one element.
struct Side {
  const void* tokens;
  void* pages;
  int64_t batch_stride, token_stride, head_stride;           // of tokens, in units of copy
  int64_t page_stride, page_token_stride, page_head_stride;  // of pages, in units of copy
};

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    kv_cache_write_kernel(const KVCacheWriteParams params, const Side k, const Side v, int32_t units_per_row) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t units_per_token = static_cast<int64_t>(params.num_kv_heads) * units_per_row;
  if (index >= params.num_tokens * units_per_token) return;
  const int32_t token = static_cast<int32_t>(index / units_per_token);
  const int32_t within = static_cast<int32_t>(index - token * units_per_token);
  const int32_t head = within / units_per_row;
  const int32_t unit = within - head * units_per_row;
  const int32_t stream = static_cast<int32_t>(blockIdx.y);

  const int32_t position = params.write_start[stream] + token;
  const int64_t page = params.page_table[stream * params.table_stride + position / params.page_size];
  const int32_t offset = position % params.page_size;
  const Side& side = blockIdx.z == 0 ? k : v;
  const Unit* source = static_cast<const Unit*>(side.tokens) + stream * side.batch_stride + token * side.token_stride +
                       head * side.head_stride + unit;
  Unit* target = static_cast<Unit*>(side.pages) + page * side.page_stride + offset * side.page_token_stride +
                 head * side.page_head_stride + unit;
  *target = *source;
}

Side side_of(const KVCacheWriteParams& p, bool values) {
  const ConstHeads& tokens = values ? p.v : p.k;
  return {tokens.data,
          values ? p.v_pages : p.k_pages,
          tokens.batch_stride,
          tokens.token_stride,
          tokens.head_stride,
          values ? p.v_page_stride : p.k_page_stride,
          values ? p.v_token_stride : p.k_token_stride,
          values ? p.v_head_stride : p.k_head_stride};
}

// Whether every address that the side reaches is a multiple of `bytes`.
bool is_aligned(const Side& side, int64_t element_size, int64_t bytes) {
  const auto misfit = [&](int64_t stride) { return stride * element_size % bytes != 0; };
  return reinterpret_cast<uintptr_t>(side.tokens) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(side.pages) % bytes == 0 && !misfit(side.batch_stride) &&
         !misfit(side.token_stride) && !misfit(side.head_stride) && !misfit(side.page_stride) &&
         !misfit(side.page_token_stride) && !misfit(side.page_head_stride);
}

Side in_units(Side side, int64_t elements_per_unit) {
  for (int64_t* stride : {&side.batch_stride, &side.token_stride, &side.head_stride, &side.page_stride,
                          &side.page_token_stride, &side.page_head_stride})
    *stride /= elements_per_unit;
  return side;
}

template <typename Unit>
int32_t launch_write(const KVCacheWriteParams& params, const Side& k, const Side& v) {
  const int64_t elements_per_unit = static_cast<int64_t>(sizeof(Unit)) / params.element_size;
  const int32_t units_per_row = static_cast<int32_t>(params.head_dim / elements_per_unit);
  const int64_t units = static_cast<int64_t>(params.num_tokens) * params.num_kv_heads * units_per_row;
  const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads), static_cast<unsigned>(params.batch), 2);
  return ptx::launch(kv_cache_write_kernel<Unit>, grid, dim3(kThreads), 0, params.stream, params,
                     in_units(k, elements_per_unit), in_units(v, elements_per_unit), units_per_row);
}

int32_t copy(const KVCacheWriteParams& params) {
  const Side k = side_of(params, false), v = side_of(params, true);
  const bool wide = params.head_dim * params.element_size % sizeof(uint4) == 0 &&
                    is_aligned(k, params.element_size, sizeof(uint4)) &&
                    is_aligned(v, params.element_size, sizeof(uint4));
  if (wide) return launch_write<uint4>(params, k, v);
  return params.element_size == 2 ? launch_write<uint16_t>(params, k, v) : launch_write<uint32_t>(params, k, v);
}

// ---- Quantised

constexpr int kWidth = 8;                           // channels of a lane: 8 bytes of a page, 16 of most inputs
constexpr int kLanesOfGroup = kInt4Group / kWidth;  // that share a scale of int4
constexpr int kNarrowLanes = 16, kNarrowHead = kNarrowLanes * kWidth;

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

// A lane's channels [c, c + kWidth) of a head, without the offset; 0 beyond head_dim.
template <typename T>
__device__ __forceinline__ void load_shifted(const T* x, const float* offset, int32_t c, int32_t head_dim, bool wide,
                                             float (&values)[kWidth]) {
  if (wide && c < head_dim) {
    ptx::load_elements<T>(x + c, values);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = c + i < head_dim ? ptx::to_float(x[c + i]) : 0.0f;
  }
  if (offset == nullptr) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    if (c + i < head_dim) values[i] -= offset[c + i];
}

// As bits, in which a NaN is larger than all numbers; the largest of `lanes` lanes.
__device__ __forceinline__ unsigned largest_magnitude(const float (&values)[kWidth], unsigned largest, int lanes) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) largest = max(largest, bits_of(values[i]) & 0x7fffffffu);
  for (lanes /= 2; lanes > 0; lanes /= 2) largest = max(largest, __shfl_xor_sync(ptx::kFullWarp, largest, lanes));
  return largest;
}

// Writes a lane's elements where its channels [c, c + kWidth) belong, in `row`.
__device__ __forceinline__ void store_quantised(uint8_t* row, int32_t c, int32_t head_dim, bool wide, PageFormat format,
                                                uint16_t scale, const float (&values)[kWidth]) {
  const float divisor = float_of(static_cast<unsigned>(scale) << 16);
  unsigned words[2] = {};
#pragma unroll
  for (int i = 0; i < kWidth; ++i)
    words[i / 4] |= quantise(divisor > 0.0f ? values[i] / divisor : 0.0f, format) << i % 4 * 8;
  int32_t byte = c, count = min(kWidth, head_dim - c);
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
    for (int i = 0; i < kWidth; ++i)
      if (i < count) row[byte + i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
}

// `wide`: a lane's channels and bytes may be accessed together. Grid: x tokens and heads, y streams, z keys and values.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    kv_cache_quantise_kernel(const KVCacheWriteParams params, int lanes, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
  const bool exists = index < static_cast<int64_t>(params.num_tokens) * params.num_kv_heads;
  const int32_t token = exists ? static_cast<int32_t>(index / params.num_kv_heads) : 0;
  const int32_t head = exists ? static_cast<int32_t>(index - static_cast<int64_t>(token) * params.num_kv_heads) : 0;
  const int32_t stream = static_cast<int32_t>(blockIdx.y);
  const bool is_values = blockIdx.z != 0;

  const int32_t position = params.write_start[stream] + token;
  const int64_t page = params.page_table[stream * params.table_stride + position / params.page_size];
  const int32_t slot = position % params.page_size;
  const bool grouped = params.format == PageFormat::int4;
  const T* x = static_cast<const T*>(is_values ? params.v.data : params.k.data) +
               stream * (is_values ? params.v.batch_stride : params.k.batch_stride) +
               token * (is_values ? params.v.token_stride : params.k.token_stride) +
               head * (is_values ? params.v.head_stride : params.k.head_stride);
  uint8_t* row = static_cast<uint8_t*>(is_values ? params.v_pages : params.k_pages) +
                 page * (is_values ? params.v_page_stride : params.k_page_stride) +
                 slot * (is_values ? params.v_token_stride : params.k_token_stride) +
                 head * (is_values ? params.v_head_stride : params.k_head_stride);
  uint16_t* scales =
      (is_values ? params.v_scales : params.k_scales) +
      ((page * params.page_size + slot) * params.num_kv_heads + head) * (grouped ? params.head_dim / kInt4Group : 1);
  const float* offset = is_values || params.k_offset == nullptr
                            ? nullptr
                            : params.k_offset + static_cast<int64_t>(head) * params.head_dim;
  const int32_t head_dim = exists ? params.head_dim : 0;  // lanes without a head come along: shuffles want them all

  // A second look at the channels is at what the first one left in the first-level cache.
  float values[kWidth];
  unsigned amax = 0;
  if (!grouped)
    for (int32_t first = 0; first < params.head_dim; first += lanes * kWidth) {
      load_shifted(x, offset, first + lane * kWidth, head_dim, wide, values);
      amax = largest_magnitude(values, amax, lanes);
    }
  for (int32_t first = 0; first < params.head_dim; first += lanes * kWidth) {
    const int32_t c = first + lane * kWidth;
    load_shifted(x, offset, c, head_dim, wide, values);
    const uint16_t scale = scale_bits(grouped ? largest_magnitude(values, 0, kLanesOfGroup) : amax, params.format);
    store_quantised(row, c, head_dim, wide, params.format, scale, values);
    if (c < head_dim && c % (grouped ? kInt4Group : params.head_dim) == 0) scales[grouped ? c / kInt4Group : 0] = scale;
  }
}

template <typename T>
bool is_wide(const ConstHeads& tokens, const void* pages, int64_t page_stride, int64_t token_stride,
             int64_t head_stride) {
  return ptx::wide_access<T>(tokens.data, tokens.batch_stride, tokens.token_stride, tokens.head_stride) &&
         (reinterpret_cast<intptr_t>(pages) | page_stride | token_stride | head_stride) % kWidth == 0;
}

int32_t quantise(const KVCacheWriteParams& params) {
  const int lanes = lanes_of_head(params.head_dim);
  const int64_t heads = static_cast<int64_t>(params.num_tokens) * params.num_kv_heads;
  const int64_t per_block = kThreads / lanes;
  const dim3 grid(static_cast<unsigned>((heads + per_block - 1) / per_block), static_cast<unsigned>(params.batch), 2);
  return ptx::with_element(params.dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide =
        params.head_dim % kWidth == 0 &&
        is_wide<T>(params.k, params.k_pages, params.k_page_stride, params.k_token_stride, params.k_head_stride) &&
        is_wide<T>(params.v, params.v_pages, params.v_page_stride, params.v_token_stride, params.v_head_stride);
    return ptx::launch(kv_cache_quantise_kernel<T>, grid, dim3(kThreads), 0, params.stream, params, lanes, wide);
  });
}

}  // namespace

int32_t kv_cache_write_cuda(const KVCacheWriteParams& params) {
  return params.format == PageFormat::elements ? copy(params) : quantise(params);
}

}  // namespace selfforcing
