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

// Of 16-bit elements: addresses and strides that are multiples of 16 bytes, and strides below 2^40 bytes (CUDA Driver
// API, cuTensorMapEncodeTiled); sizes are int32 and thus below its 2^32.
template <typename Pointer>
bool fits_tensor_map(const Heads<Pointer>& tensor, int64_t streams, int64_t rows, int64_t heads) {
  if (rows == 0) return true;
  constexpr int64_t kBytes = 16, kElements = kBytes / 2, kLimit = (int64_t{1} << 40) / 2;
  const auto fits = [](int64_t stride, int64_t size) {
    return size <= 1 || (stride > 0 && stride < kLimit && stride % kElements == 0);
  };
  return reinterpret_cast<uintptr_t>(tensor.data) % kBytes == 0 && fits(tensor.batch_stride, streams) &&
         fits(tensor.token_stride, rows) && fits(tensor.head_stride, heads);
}

// Whether pages hold something else than what the products take: quantised elements, or keys without their rotation.
inline bool has_coded_pages(const PagedPast& past) {
  return past.k_pages != nullptr && (past.format != PageFormat::elements || past.rope_table != nullptr);
}

// Pages of elements. Keys that are rotated when they are read are loaded 16 bytes at a time, which asks for less.
inline bool fits_page_copies(const AttentionParams& p) {
  const auto fits = [&](bool values) {
    return fits_tensor_map(heads_of_pages(p.past, values), p.past.num_pages, p.past.page_size, p.num_kv_heads);
  };
  return p.past.format == PageFormat::elements && p.past.page_size % 8 == 0 && fits(false) && fits(true);
}

// Quantised pages, of any size: they are loaded 8 bytes at a time.
inline bool fits_page_loads(const PagedPast& past) {
  const auto fits = [](const void* data, int64_t page_stride, int64_t token_stride, int64_t head_stride) {
    return (reinterpret_cast<uintptr_t>(data) | page_stride | token_stride | head_stride) % 8 == 0;
  };
  return past.format != PageFormat::elements &&
         fits(past.k_pages, past.k_page_stride, past.k_token_stride, past.k_head_stride) &&
         fits(past.v_pages, past.v_page_stride, past.v_token_stride, past.v_head_stride);
}

// Everything but the past.
inline bool fits_hopper_tensors(const AttentionParams& p) {
  constexpr int32_t kLeastHeadDim = 40, kMostHeadDim = 128;
  return p.dtype != DType::float32 && p.head_dim >= kLeastHeadDim && p.head_dim <= kMostHeadDim &&
         fits_tensor_map(p.q, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.k, p.batch, p.num_keys, p.num_kv_heads) &&
         fits_tensor_map(p.v, p.batch, p.num_keys, p.num_kv_heads);
}

// Masked scores are -inf before they are scaled: the scale must not make NaN of them.
inline bool fits_hopper_forward(const AttentionParams& p) {
  const bool past_fits = p.past.k_pages == nullptr || fits_page_copies(p) || fits_page_loads(p.past);
  return fits_hopper_tensors(p) && past_fits && std::isnormal(p.softmax_scale) &&
         fits_tensor_map(p.out, p.batch, p.num_queries, p.num_heads);
}

// Coded pages go to the kernels for every GPU.
inline bool fits_hopper_backward(const AttentionBackwardParams& p) {
  const bool past_fits = p.past.k_pages == nullptr || (!has_coded_pages(p.past) && fits_page_copies(p));
  return fits_hopper_tensors(p) && past_fits && fits_tensor_map(p.grad_out, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.grad_q, p.batch, p.num_queries, p.num_heads) &&
         fits_tensor_map(p.grad_k, p.batch, p.num_keys, p.num_kv_heads) &&
         fits_tensor_map(p.grad_v, p.batch, p.num_keys, p.num_kv_heads);
}

}  // namespace selfforcing::attention_cuda
