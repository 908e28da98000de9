// Writing a block's keys and values into the pages of a cache.
#pragma once
#include "../geometry/parallel.h"
#include "../geometry/tensor.h"

namespace selfforcing {

// Token i of stream b goes to position write_start[b] + i: page page_table[b][position / page_size], offset
// position % page_size.
struct KVCacheWriteParams {
  int32_t element_size = 0;  // bytes; a write moves bits and does not look at them
  int32_t batch = 0;
  int32_t num_tokens = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t page_size = 0;

  ConstHeads k, v;          // [B, num_tokens, H_kv, D]
  void* k_pages = nullptr;  // [num_pages, page_size, H_kv, D]
  void* v_pages = nullptr;
  int64_t k_page_stride = 0, k_token_stride = 0, k_head_stride = 0;  // in elements
  int64_t v_page_stride = 0, v_token_stride = 0, v_head_stride = 0;
  const int32_t* page_table = nullptr;  // [B, table_stride]
  int64_t table_stride = 0;
  const int32_t* write_start = nullptr;  // [B]

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

void kv_cache_write_cpu(const KVCacheWriteParams& params);
int32_t kv_cache_write_cuda(const KVCacheWriteParams& params);

}  // namespace selfforcing
