#include "cuda_dispatch.h"
#include "cuda_hopper_backward.cuh"

namespace selfforcing::attention_cuda {

int64_t hopper_backward_workspace_bytes_float16(const AttentionBackwardParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(hopper_backward_workspace_bytes, ptx::float16, params);
}

int32_t hopper_backward_float16(const AttentionBackwardParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(launch_hopper_backward, ptx::float16, params);
}

}  // namespace selfforcing::attention_cuda
