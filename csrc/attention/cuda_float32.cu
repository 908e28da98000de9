#include "cuda_backward.cuh"
#include "cuda_dispatch.h"
#include "cuda_forward.cuh"

namespace selfforcing::attention_cuda {

int32_t forward_float32(const AttentionParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_forward, float, params);
}

int32_t backward_float32(const AttentionBackwardParams& params) {
  return SELFFORCING_ATTENTION_BY_HEAD_DIM(launch_backward, float, params);
}

}  // namespace selfforcing::attention_cuda
