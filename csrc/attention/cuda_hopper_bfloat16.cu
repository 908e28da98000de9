#include "cuda_dispatch.h"
#include "cuda_hopper_forward.cuh"

namespace selfforcing::attention_cuda {

int64_t hopper_forward_workspace_bytes_bfloat16(const AttentionParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(hopper_forward_workspace_bytes, ptx::bfloat16, params);
}

int32_t hopper_forward_bfloat16(const AttentionParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(launch_hopper_forward, ptx::bfloat16, params);
}

}  // namespace selfforcing::attention_cuda
