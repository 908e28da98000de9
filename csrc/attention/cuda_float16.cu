#include "cuda_backward.cuh"
#include "cuda_dispatch.h"
#include "cuda_forward.cuh"

namespace selfforcing::attention_cuda {

int32_t forward_float16(const AttentionParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_forward, ptx::float16, params);
}

int32_t backward_float16(const AttentionBackwardParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_backward, ptx::float16, params);
}

}  // namespace selfforcing::attention_cuda
