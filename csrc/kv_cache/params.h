// Writing a block's keys and values into the pages of a cache.
#pragma once
#include "../geometry/pages.h"
#include "../geometry/parallel.h"
#include "../geometry/tensor.h"
#include "../rope/params.h"

namespace selfforcing {

// Token i of stream b goes to position write_start[b] + i: page page_table[b][position / page_size], offset
// position % page_size. Into pages of elements a write moves bits and does not look at them. Quantised
// (python_ref/ops/quantization.py is the definition, and every kernel gives its bits), the scale of a token and head,
// or in int4 of a group, is
//     max |x - offset| / largest element, in float32, rounded up to bfloat16; 0 if the quotient is below 2^-126,
// NaN if the maximum is not finite, and an element is (x - offset) / scale in float32, rounded to the nearest even, or
// 0 where the scale is 0 or NaN.
struct KVCacheWriteParams {
  PageFormat format = PageFormat::elements;
  DType dtype = DType::float32;  // of k and v
  int32_t element_size = 4;      // bytes of one of theirs; pages of elements have the same
  int32_t batch = 0;
  int32_t num_tokens = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t page_size = 0;

  ConstHeads k, v;          // [B, num_tokens, H_kv, D]
  void* k_pages = nullptr;  // [num_pages, page_size, H_kv, D (int4: D / 2)]
  void* v_pages = nullptr;
  int64_t k_page_stride = 0, k_token_stride = 0, k_head_stride = 0;  // in elements as stored: int4 in bytes
  int64_t v_page_stride = 0, v_token_stride = 0, v_head_stride = 0;
  uint16_t* k_scales = nullptr;  // bfloat16 [num_pages, page_size, H_kv, 1 (int4: D / kInt4Group)], contiguous
  uint16_t* v_scales = nullptr;
  const float* k_offset = nullptr;      // [H_kv, D], or nullptr
  const int32_t* page_table = nullptr;  // [B, table_stride]
  int64_t table_stride = 0;
  const int32_t* write_start = nullptr;  // [B]

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// The same of keys that are not normalised yet: norm.y (csrc/rope/params.h), which is write.k, is computed and written
// into its pages in one pass.
struct NormRopeWriteParams {
  QkNormRopeParams norm;
  KVCacheWriteParams write;

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

void kv_cache_write_cpu(const KVCacheWriteParams& params);
void kv_cache_norm_rope_write_cpu(const NormRopeWriteParams& params);

// Launch on params.stream and return the launch error as cudaError_t (0 is success).
int32_t kv_cache_write_cuda(const KVCacheWriteParams& params);
int32_t kv_cache_norm_rope_write_cuda(const NormRopeWriteParams& params);

}  // namespace selfforcing
