// selfforcing::kv_cache_write and kv_cache_norm_rope_write: checks, then fills the params of the kernels.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../kernel_call.h"
#include "../page_checks.h"
#include "../rope_checks.h"
#include "params.h"

namespace selfforcing {
namespace {

// k_pages, v_pages [P, page_size, H_kv, D (int4: D / 2)]; page_table int32 [B, T]; write_start int32 [B]; k, v [B, L,
// H_kv, D]; quantised pages have k_scales, v_scales bfloat16 [P, page_size, H_kv, groups] and may have k_offset float32
// [H_kv, D].
KVCacheWriteParams write_params(const std::string& op, Tensor& k_pages, Tensor& v_pages, const Tensor& page_table,
                                const Tensor& write_start, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                const std::optional<Tensor>& k_offset) {
  KVCacheWriteParams p;
  p.dtype = check_float_dtype(k, (op + ": k").c_str());
  check_shape(k, (op + ": k").c_str(), "[B, L, H_kv, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), head_dim = k.size(3);
  check_shape(v, (op + ": v").c_str(), "[B, L, H_kv, D] like k", {batch, tokens, heads, head_dim});
  p.format = page_format(op, k_pages, k, "k");
  check_pages(op, p.format, k_pages, v_pages, k_scales, v_scales, k_offset, heads, head_dim, k, "k");
  check_shape(page_table, (op + ": page_table").c_str(), "[B, T]", {batch, kAnySize});
  check_shape(write_start, (op + ": write_start").c_str(), "[B]", {batch});
  check_same_dtype(v, (op + ": v").c_str(), k, "k");
  check_same_device(v, (op + ": v").c_str(), k, "k");
  check_last_dim_contiguous(k, (op + ": k").c_str());
  check_last_dim_contiguous(v, (op + ": v").c_str());
  check_index_tensor(page_table, (op + ": page_table").c_str(), k, "k");
  check_index_tensor(write_start, (op + ": write_start").c_str(), k, "k");

  p.element_size = static_cast<int32_t>(k.element_size());
  p.batch = size_int32(batch, "B");
  p.num_tokens = size_int32(tokens, "L");
  p.num_kv_heads = size_int32(heads, "H_kv");
  p.head_dim = size_int32(head_dim, "D");
  p.page_size = size_int32(k_pages.size(1), "page_size");
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
  if (k_scales.has_value()) p.k_scales = static_cast<uint16_t*>(k_scales->mutable_data_ptr());
  if (v_scales.has_value()) p.v_scales = static_cast<uint16_t*>(v_scales->mutable_data_ptr());
  if (k_offset.has_value()) p.k_offset = k_offset->const_data_ptr<float>();
  p.page_table = page_table.const_data_ptr<int32_t>();
  p.table_stride = page_table.size(1);
  p.write_start = write_start.const_data_ptr<int32_t>();
  return p;
}

#ifndef SELFFORCING_WITH_CUDA
// Page numbers are read from memory, and a wrong one would write anywhere: on the CPU they can be looked at first.
void check_targets(const std::string& op, const KVCacheWriteParams& p, int64_t num_pages) {
  for (int64_t stream = 0; stream < p.batch; ++stream) {
    const int64_t start = p.write_start[stream], end = start + p.num_tokens;
    check(start >= 0 && end <= p.table_stride * p.page_size, op, ": write_start[", stream, "] is ", start, ", but its ",
          p.num_tokens, " tokens must lie in the ", p.table_stride, " pages of page_table");
    for (int64_t row = start / p.page_size; row * p.page_size < end; ++row) {
      const int64_t page = p.page_table[stream * p.table_stride + row];
      check(page >= 0 && page < num_pages, op, ": page_table[", stream, ", ", row, "] is ", page,
            ", but must be in [0, ", num_pages, ")");
    }
  }
}
#endif

void kv_cache_write(Tensor k_pages, Tensor v_pages, const Tensor& page_table, const Tensor& write_start,
                    const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                    const std::optional<Tensor>& v_scales, const std::optional<Tensor>& k_offset) {
  KVCacheWriteParams params =
      write_params("kv_cache_write", k_pages, v_pages, page_table, write_start, k, v, k_scales, v_scales, k_offset);
  if (k.numel() == 0) return;
#ifndef SELFFORCING_WITH_CUDA
  check_targets("kv_cache_write", params, k_pages.size(0));
#endif
  run_kernel("kv_cache_write", SELFFORCING_KERNEL(kv_cache_write), params, k);
}

// The same with k [B, L, H_kv * D], which is normalised and rotated first; weight float32 [H_kv * D]; start_frame int32
// [1] or [B]; grid (frames, rows, columns). -> the keys that were written [B, L, H_kv, D]
Tensor kv_cache_norm_rope_write(Tensor k_pages, Tensor v_pages, const Tensor& page_table, const Tensor& write_start,
                                const Tensor& k, const Tensor& v, const Tensor& weight, const Tensor& start_frame,
                                const std::vector<int64_t>& grid, double eps, const std::optional<Tensor>& k_scales,
                                const std::optional<Tensor>& v_scales, const std::optional<Tensor>& k_offset) {
  const std::string op = "kv_cache_norm_rope_write";
  check_shape(v, (op + ": v").c_str(), "[B, L, H_kv, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  NormRopeWriteParams p;
  p.norm = qk_norm_rope_params(op, k, "k", weight, start_frame, v.size(2), grid, eps);
  Tensor y = new_tensor(std::array<int64_t, 4>{k.size(0), k.size(1), v.size(2), p.norm.head_dim}, k);
  p.write = write_params(op, k_pages, v_pages, page_table, write_start, y, v, k_scales, v_scales, k_offset);
  if (k.numel() == 0) return y;
#ifndef SELFFORCING_WITH_CUDA
  check_targets(op, p.write, k_pages.size(0));
#endif
  const std::optional<Tensor> table = new_rope_table(p.norm, k);
  Tensor rstd = empty_floats<2>({k.size(0), k.size(1)}, k);
  p.norm.rstd = rstd.mutable_data_ptr<float>();
  p.norm.y = mutable_heads(y);
  run_kernel("kv_cache_norm_rope_write", SELFFORCING_KERNEL(kv_cache_norm_rope_write), p, k);
  return y;
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("kv_cache_write", TORCH_BOX(&selfforcing::kv_cache_write));
  m.impl("kv_cache_norm_rope_write", TORCH_BOX(&selfforcing::kv_cache_norm_rope_write));
}
