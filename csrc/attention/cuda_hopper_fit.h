// Which calls the kernels for Hopper take: what tensor maps can describe, with head dims that pay. The others go to the
// kernels for every GPU.
#pragma once
#include <cmath>

#include "params.h"

namespace selfforcing::attention_cuda {

// Pages of a past as heads: a page is a stream of page_size rows.
inline ConstHeads heads_of_pages(const PagedPast& past, bool values) {
  return values ? ConstHeads{past.v_pages, past.v_page_stride, past.v_token_stride, past.v_head_stride}
                : ConstHeads{past.k_pages, past.k_page_stride, past.k_token_stride, past.k_head_stride};
}

// How many rows of a page are copied at once: they divide the page and a tile of `tile_rows` rows, are a power of two,
// and at least the eight that swizzles work on. 0: there is no such number.
inline int32_t page_box_rows(int32_t page_size, int32_t tile_rows) {
  constexpr int32_t kLeast = 8, kMost = 64;
  for (int32_t rows = kMost; rows >= kLeast; rows /= 2)
    if (page_size % rows == 0 && tile_rows % rows == 0) return rows;
  return 0;
}

// Of 16-bit elements: addresses and strides that are multiples of 16 bytes (CUDA Driver API, cuTensorMapEncodeTiled).
template <typename Pointer>
bool fits_tensor_map(const Heads<Pointer>& tensor, int64_t streams, int64_t rows, int64_t heads) {
  if (rows == 0) return true;
  constexpr int64_t kBytes = 16, kElements = kBytes / 2;
  const auto fits = [](int64_t stride, int64_t size) { return size <= 1 || (stride > 0 && stride % kElements == 0); };
  return reinterpret_cast<uintptr_t>(tensor.data) % kBytes == 0 && fits(tensor.batch_stride, streams) &&
         fits(tensor.token_stride, rows) && fits(tensor.head_stride, heads);
}

inline bool fits_hopper_tiles(const AttentionParams& p) {
  constexpr int32_t kLeastHeadDim = 40, kMostHeadDim = 128;
  const PagedPast& past = p.past;
  const auto pages_fit = [&](bool values) {
    return fits_tensor_map(heads_of_pages(past, values), past.num_pages, past.page_size, p.num_kv_heads);
  };
  const bool past_fits =
      past.k_pages == nullptr || (past.format == PageFormat::elements && past.rope_table == nullptr &&
                                  past.page_size % 8 == 0 && pages_fit(false) && pages_fit(true));
  return p.dtype != DType::float32 && p.head_dim >= kLeastHeadDim && p.head_dim <= kMostHeadDim && past_fits &&
         fits_tensor_map(p.q, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.k, p.batch, p.num_keys, p.num_kv_heads) &&
         fits_tensor_map(p.v, p.batch, p.num_keys, p.num_kv_heads);
}

// Masked scores are -inf before they are scaled: the scale must not make NaN of them.
inline bool fits_hopper_forward(const AttentionParams& p) {
  return fits_hopper_tiles(p) && std::isnormal(p.softmax_scale) &&
         fits_tensor_map(p.out, p.batch, p.num_queries, p.num_heads);
}

inline bool fits_hopper_backward(const AttentionBackwardParams& p) {
  return fits_hopper_tiles(p) && fits_tensor_map(p.grad_out, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.grad_q, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.grad_k, p.batch, p.num_keys, p.num_kv_heads) &&
         fits_tensor_map(p.grad_v, p.batch, p.num_keys, p.num_kv_heads);
}

}  // namespace selfforcing::attention_cuda
