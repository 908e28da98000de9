// The CUDA kernels by element type: each type is instantiated in a file of its own (cuda_<type>.cu), so that builds run
// in parallel; cuda.cu chooses. float32 has kernels of its own; bfloat16 and float16 go to the tensor cores.
#pragma once
#include "params.h"

namespace selfforcing::attention_cuda {

int32_t forward_float32(const AttentionParams& params);
int32_t backward_float32(const AttentionBackwardParams& params);

int64_t forward_workspace_bytes_bfloat16(const AttentionParams& params);
int32_t forward_bfloat16(const AttentionParams& params);
int32_t backward_bfloat16(const AttentionBackwardParams& params);

int64_t forward_workspace_bytes_float16(const AttentionParams& params);
int32_t forward_float16(const AttentionParams& params);
int32_t backward_float16(const AttentionBackwardParams& params);

// Calls `function` with the narrowest kernel that holds head_dim. A narrower head is padded with zeros in shared
// memory, never in device memory.
#define SELFFORCING_MMA_BY_HEAD_DIM(function, T, params) \
  ((params).head_dim <= 32    ? function<T, 32>(params)  \
   : (params).head_dim <= 64  ? function<T, 64>(params)  \
   : (params).head_dim <= 96  ? function<T, 96>(params)  \
   : (params).head_dim <= 128 ? function<T, 128>(params) \
                              : function<T, 256>(params))

}  // namespace selfforcing::attention_cuda
