#include "cuda_backward.cuh"
#include "cuda_dispatch.h"
#include "cuda_forward.cuh"

namespace selfforcing::attention_cuda {

int32_t forward_bfloat16(const AttentionParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_forward, ptx::bfloat16, params);
}

int32_t backward_bfloat16(const AttentionBackwardParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_backward, ptx::bfloat16, params);
}

}  // namespace selfforcing::attention_cuda
