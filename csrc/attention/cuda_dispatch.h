// The CUDA kernels by element type: each type is instantiated in a file of its own (cuda_<type>.cu), so that builds run
// in parallel; cuda.cu chooses. float32 has kernels of its own; bfloat16 and float16 go to the tensor cores.
#pragma once
#include "params.h"

namespace selfforcing::attention_cuda {

int32_t forward_float32(const AttentionParams& params);
int32_t backward_float32(const AttentionBackwardParams& params);

int64_t forward_workspace_bytes_bfloat16(const AttentionParams& params);
int32_t forward_bfloat16(const AttentionParams& params);
int64_t backward_workspace_bytes_bfloat16(const AttentionBackwardParams& params);
int32_t backward_bfloat16(const AttentionBackwardParams& params);

int64_t forward_workspace_bytes_float16(const AttentionParams& params);
int32_t forward_float16(const AttentionParams& params);
int64_t backward_workspace_bytes_float16(const AttentionBackwardParams& params);
int32_t backward_float16(const AttentionBackwardParams& params);

// For compute capability 9.0 alone, where a build has sm_90a: calls that fit (cuda_hopper_fit.h).
int64_t hopper_forward_workspace_bytes_bfloat16(const AttentionParams& params);
int32_t hopper_forward_bfloat16(const AttentionParams& params);
int64_t hopper_backward_workspace_bytes_bfloat16(const AttentionBackwardParams& params);
int32_t hopper_backward_bfloat16(const AttentionBackwardParams& params);

int64_t hopper_forward_workspace_bytes_float16(const AttentionParams& params);
int32_t hopper_forward_float16(const AttentionParams& params);
int64_t hopper_backward_workspace_bytes_float16(const AttentionBackwardParams& params);
int32_t hopper_backward_float16(const AttentionBackwardParams& params);

inline int64_t hopper_forward_workspace_bytes(const AttentionParams& params) {
  return params.dtype == DType::bfloat16 ? hopper_forward_workspace_bytes_bfloat16(params)
                                         : hopper_forward_workspace_bytes_float16(params);
}
inline int32_t hopper_forward(const AttentionParams& params) {
  return params.dtype == DType::bfloat16 ? hopper_forward_bfloat16(params) : hopper_forward_float16(params);
}
inline int64_t hopper_backward_workspace_bytes(const AttentionBackwardParams& params) {
  return params.dtype == DType::bfloat16 ? hopper_backward_workspace_bytes_bfloat16(params)
                                         : hopper_backward_workspace_bytes_float16(params);
}
inline int32_t hopper_backward(const AttentionBackwardParams& params) {
  return params.dtype == DType::bfloat16 ? hopper_backward_bfloat16(params) : hopper_backward_float16(params);
}

// Calls `function` with the narrowest kernel that holds head_dim. A narrower head is padded with zeros in shared
// memory, never in device memory.
#define SELFFORCING_MMA_BY_HEAD_DIM(function, T, params) \
  ((params).head_dim <= 32    ? function<T, 32>(params)  \
   : (params).head_dim <= 64  ? function<T, 64>(params)  \
   : (params).head_dim <= 96  ? function<T, 96>(params)  \
   : (params).head_dim <= 128 ? function<T, 128>(params) \
                              : function<T, 256>(params))

// The same of the kernels for Hopper, which end at head dim 128.
#define SELFFORCING_HOPPER_BY_HEAD_DIM(function, T, params) \
  ((params).head_dim <= 64   ? function<T, 64>(params)      \
   : (params).head_dim <= 96 ? function<T, 96>(params)      \
                             : function<T, 128>(params))

}  // namespace selfforcing::attention_cuda
