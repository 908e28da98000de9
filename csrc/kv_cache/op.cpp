// selfforcing::kv_cache_write: checks, then fills the params of the kernels.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../kernel_call.h"
#include "params.h"

namespace selfforcing {
namespace {

// k_pages, v_pages [P, page_size, H_kv, D]; page_table int32 [B, T]; write_start int32 [B]; k, v [B, L, H_kv, D].
KVCacheWriteParams write_params(Tensor& k_pages, Tensor& v_pages, const Tensor& page_table, const Tensor& write_start,
                                const Tensor& k, const Tensor& v) {
  check_float_dtype(k, "kv_cache_write: k");
  check_shape(k, "kv_cache_write: k", "[B, L, H_kv, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), head_dim = k.size(3);
  check_shape(v, "kv_cache_write: v", "[B, L, H_kv, D] like k", {batch, tokens, heads, head_dim});
  check_shape(k_pages, "kv_cache_write: k_pages", "[P, page_size, H_kv, D]", {kAnySize, kAnySize, heads, head_dim});
  check_shape(v_pages, "kv_cache_write: v_pages", "[P, page_size, H_kv, D] like k_pages",
              {k_pages.size(0), k_pages.size(1), heads, head_dim});
  check_shape(page_table, "kv_cache_write: page_table", "[B, T]", {batch, kAnySize});
  check_shape(write_start, "kv_cache_write: write_start", "[B]", {batch});
  for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{v, "kv_cache_write: v"},
                                     {k_pages, "kv_cache_write: k_pages"},
                                     {v_pages, "kv_cache_write: v_pages"}}) {
    check_same_dtype(tensor, name, k, "k");
    check_same_device(tensor, name, k, "k");
    check_last_dim_contiguous(tensor, name);
  }
  check_last_dim_contiguous(k, "kv_cache_write: k");
  check_index_tensor(page_table, "kv_cache_write: page_table", k, "k");
  check_index_tensor(write_start, "kv_cache_write: write_start", k, "k");

  KVCacheWriteParams p;
  p.element_size = static_cast<int32_t>(k.element_size());
  p.batch = size_int32(batch, "kv_cache_write: B");
  p.num_tokens = size_int32(tokens, "kv_cache_write: L");
  p.num_kv_heads = size_int32(heads, "kv_cache_write: H_kv");
  p.head_dim = size_int32(head_dim, "kv_cache_write: D");
  p.page_size = size_int32(k_pages.size(1), "kv_cache_write: page_size");
  check(p.page_size > 0, "kv_cache_write: page_size is 0, but must be at least 1");
  p.k = const_heads(k);
  p.v = const_heads(v);
  p.k_pages = k_pages.mutable_data_ptr();
  p.v_pages = v_pages.mutable_data_ptr();
  p.k_page_stride = k_pages.stride(0);
  p.k_token_stride = k_pages.stride(1);
  p.k_head_stride = k_pages.stride(2);
  p.v_page_stride = v_pages.stride(0);
  p.v_token_stride = v_pages.stride(1);
  p.v_head_stride = v_pages.stride(2);
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.table_stride = page_table.size(1);
  p.write_start = write_start.const_data_ptr<int32_t>();
  return p;
}

#ifndef SELFFORCING_WITH_CUDA
// Page numbers are read from memory, and a wrong one would write anywhere: on the CPU they can be looked at first.
void check_targets(const KVCacheWriteParams& p, int64_t num_pages) {
  for (int64_t stream = 0; stream < p.batch; ++stream) {
    const int64_t start = p.write_start[stream], end = start + p.num_tokens;
    check(start >= 0 && end <= p.table_stride * p.page_size, "kv_cache_write: write_start[", stream, "] is ", start,
          ", but its ", p.num_tokens, " tokens must lie in the ", p.table_stride, " pages of page_table");
    for (int64_t row = start / p.page_size; row * p.page_size < end; ++row) {
      const int64_t page = p.page_table[stream * p.table_stride + row];
      check(page >= 0 && page < num_pages, "kv_cache_write: page_table[", stream, ", ", row, "] is ", page,
            ", but must be in [0, ", num_pages, ")");
    }
  }
}
#endif

void kv_cache_write(Tensor k_pages, Tensor v_pages, const Tensor& page_table, const Tensor& write_start,
                    const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                    const std::optional<Tensor>& v_scales, const std::optional<Tensor>& k_offset) {
  check(!k_scales.has_value() && !v_scales.has_value() && !k_offset.has_value(),
        "kv_cache_write: quantised pages are not supported yet");
  KVCacheWriteParams params = write_params(k_pages, v_pages, page_table, write_start, k, v);
#ifndef SELFFORCING_WITH_CUDA
  check_targets(params, k_pages.size(0));
#endif
  run_kernel("kv_cache_write", SELFFORCING_KERNEL(kv_cache_write), params, k);
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("kv_cache_write", TORCH_BOX(&selfforcing::kv_cache_write));
}
