#include "cuda_dispatch.h"
#include "cuda_hopper_forward.cuh"

namespace selfforcing::attention_cuda {

int64_t hopper_forward_workspace_bytes_float16(const AttentionParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(hopper_forward_workspace_bytes, ptx::float16, params);
}

int32_t hopper_forward_float16(const AttentionParams& params) {
  return SELFFORCING_HOPPER_BY_HEAD_DIM(launch_hopper_forward, ptx::float16, params);
}

}  // namespace selfforcing::attention_cuda
