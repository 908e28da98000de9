// The CUDA kernels by element type: each type is instantiated in a file of its own (cuda_<type>.cu), so that builds run
// in parallel; cuda.cu chooses.
#pragma once
#include "params.h"

namespace selfforcing::attention_cuda {

int32_t forward_float32(const AttentionParams& params);
int32_t forward_bfloat16(const AttentionParams& params);
int32_t forward_float16(const AttentionParams& params);
int32_t backward_float32(const AttentionBackwardParams& params);
int32_t backward_bfloat16(const AttentionBackwardParams& params);
int32_t backward_float16(const AttentionBackwardParams& params);

// Calls `launch` with the narrowest kernel that holds head_dim. Kernels exist for 64, 128 and 256: a narrower head is
// padded with zeros in shared memory, never in device memory.
#define SELFFORCING_ATTENTION_BY_HEAD_DIM(launch, T, params) \
  ((params).head_dim <= 64    ? launch<T, 64>(params)        \
   : (params).head_dim <= 128 ? launch<T, 128>(params)       \
                              : launch<T, 256>(params))

}  // namespace selfforcing::attention_cuda
