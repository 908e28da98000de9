// Writing a block's keys and values into pages: of elements, a copy that moves bits, 16 bytes of a thread at a time,
// and does not look at them; quantised, a pass in which some lanes of a warp share a token's head.
#include <algorithm>

#include "../ptx/launch.cuh"
#include "cuda_tokens.cuh"

namespace selfforcing {
namespace {

constexpr int kThreads = 256;

// ---- Elements

// What a thread moves at a time (a unit) are sixteen bytes where both sides allow it, else one element.
struct Side {
  const void* tokens;
  void* pages;
  int64_t batch_stride, token_stride, head_stride;           // of tokens, in units of copy
  int64_t page_stride, page_token_stride, page_head_stride;  // of pages, in units of copy
};

// A block moves kTokens tokens of keys or values, a thread the same units of each: it loads them all before it stores
// the first, and finds the place of a unit in its token once. Grid: x tokens, y streams, z keys and values.
constexpr int kTokens = 4;

template <typename Unit>
__global__ void __launch_bounds__(kThreads) kv_cache_write_kernel(const KVCacheWriteParams params, const Side k,
                                                                  const Side v, int32_t heads, int32_t units_per_row) {
  const Side side = blockIdx.z == 0 ? k : v;  // a reference would need both in local memory
  const int32_t stream = static_cast<int32_t>(blockIdx.y), first = static_cast<int32_t>(blockIdx.x) * kTokens;
  const int32_t left = params.num_tokens - first;
  const Unit* sources[kTokens];
  Unit* targets[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int32_t token = first + (t < left ? t : 0);
    const PageSlot slot(params, stream, token);
    sources[t] = static_cast<const Unit*>(side.tokens) + stream * side.batch_stride + token * side.token_stride;
    targets[t] = static_cast<Unit*>(side.pages) + slot.row(side.page_stride, side.page_token_stride);
  }
  for (int32_t unit = static_cast<int32_t>(threadIdx.x); unit < heads * units_per_row;
       unit += static_cast<int32_t>(blockDim.x)) {
    const int32_t head = unit / units_per_row, within = unit - head * units_per_row;
    Unit units[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < left) units[t] = sources[t][head * side.head_stride + within];
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (t < left) targets[t][head * side.page_head_stride + within] = units[t];
  }
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
  // Heads that adjoin each other everywhere are one.
  const auto adjoin = [&](const Side& side) {
    return side.head_stride == params.head_dim && side.page_head_stride == params.head_dim;
  };
  const bool whole = adjoin(k) && adjoin(v);
  const int64_t elements_per_unit = static_cast<int64_t>(sizeof(Unit)) / params.element_size;
  const int32_t units = static_cast<int32_t>(params.num_kv_heads * params.head_dim / elements_per_unit);
  const int32_t heads = whole ? 1 : params.num_kv_heads;
  const int32_t warps = (units + ptx::kWarpSize - 1) / ptx::kWarpSize;
  const dim3 grid(static_cast<unsigned>((params.num_tokens + kTokens - 1) / kTokens),
                  static_cast<unsigned>(params.batch), 2);
  return ptx::launch(kv_cache_write_kernel<Unit>, grid,
                     dim3(static_cast<unsigned>(std::min(warps * ptx::kWarpSize, kThreads))), 0, params.stream, params,
                     in_units(k, elements_per_unit), in_units(v, elements_per_unit), heads, units / heads);
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

// Of a multiprocessor: 48 registers for each thread, where the compiler would rather spill than use more than 40.
constexpr int kQuantiseBlocks = 5;

// Grid: x tokens and heads, y streams, z keys and values.
template <typename T>
__global__ void __launch_bounds__(kThreads, kQuantiseBlocks)
    kv_cache_quantise_kernel(const KVCacheWriteParams params, int lanes, bool wide) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + static_cast<int>(threadIdx.x) / lanes;
  const bool exists = index < static_cast<int64_t>(params.num_tokens) * params.num_kv_heads;
  const int32_t token = exists ? static_cast<int32_t>(index / params.num_kv_heads) : 0;
  const int32_t head = exists ? static_cast<int32_t>(index - static_cast<int64_t>(token) * params.num_kv_heads) : 0;
  const int64_t stream = blockIdx.y;
  quantise_head<T>(params, blockIdx.z != 0, PageSlot(params, stream, token), stream, token, head, exists, lane, lanes,
                   wide);
}

int32_t quantise(const KVCacheWriteParams& params) {
  const int lanes = lanes_of_head(params.head_dim);
  const int64_t heads = static_cast<int64_t>(params.num_tokens) * params.num_kv_heads;
  const int64_t per_block = kThreads / lanes;
  const dim3 grid(static_cast<unsigned>((heads + per_block - 1) / per_block), static_cast<unsigned>(params.batch), 2);
  return ptx::with_element(params.dtype, [&](auto element) {
    using T = decltype(element);
    return ptx::launch(kv_cache_quantise_kernel<T>, grid, dim3(kThreads), 0, params.stream, params, lanes,
                       quantises_wide<T>(params));
  });
}

}  // namespace

int32_t kv_cache_write_cuda(const KVCacheWriteParams& params) {
  return params.format == PageFormat::elements ? copy(params) : quantise(params);
}

}  // namespace selfforcing
