// Writing a block's keys and values into pages: a copy, 16 bytes per thread, that moves bits and does not look at them.
#include "../ptx/launch.cuh"
#include "params.h"

namespace selfforcing {
namespace {

constexpr int kThreads = 256;

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

}  // namespace

int32_t kv_cache_write_cuda(const KVCacheWriteParams& params) {
  const Side k = side_of(params, false), v = side_of(params, true);
  const bool wide = params.head_dim * params.element_size % sizeof(uint4) == 0 &&
                    is_aligned(k, params.element_size, sizeof(uint4)) &&
                    is_aligned(v, params.element_size, sizeof(uint4));
  if (wide) return launch_write<uint4>(params, k, v);
  return params.element_size == 2 ? launch_write<uint16_t>(params, k, v) : launch_write<uint32_t>(params, k, v);
}

}  // namespace selfforcing
