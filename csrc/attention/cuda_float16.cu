#include "cuda_dispatch.h"
#include "cuda_mma_backward.cuh"
#include "cuda_mma_forward.cuh"

namespace selfforcing::attention_cuda {

int64_t forward_workspace_bytes_float16(const AttentionParams& params) {
  return SELFFORCING_MMA_BY_HEAD_DIM(mma_forward_workspace_bytes, ptx::float16, params);
}

int32_t forward_float16(const AttentionParams& params) {
  return SELFFORCING_MMA_BY_HEAD_DIM(launch_mma_forward, ptx::float16, params);
}

int64_t backward_workspace_bytes_float16(const AttentionBackwardParams& params) {
  return SELFFORCING_MMA_BY_HEAD_DIM(mma_backward_workspace_bytes, ptx::float16, params);
}

int32_t backward_float16(const AttentionBackwardParams& params) {
  return SELFFORCING_MMA_BY_HEAD_DIM(launch_mma_backward, ptx::float16, params);
}

}  // namespace selfforcing::attention_cuda
