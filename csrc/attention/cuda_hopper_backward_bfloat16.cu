#include "cuda_dispatch.h"
#include "cuda_hopper_backward.cuh"

namespace selfforcing::attention_cuda {

int64_t hopper_backward_workspace_bytes_bfloat16(const AttentionBackwardParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(hopper_backward_workspace_bytes, ptx::bfloat16, params);
}

int32_t hopper_backward_bfloat16(const AttentionBackwardParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(launch_hopper_backward, ptx::bfloat16, params);
}

}  // namespace selfforcing::attention_cuda
