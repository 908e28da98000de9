#include "cuda_dispatch.h"
#include "cuda_float32_backward.cuh"
#include "cuda_float32_forward.cuh"

namespace selfforcing::attention_cuda {

int32_t forward_float32(const AttentionParams& params) {
  return params.head_dim <= 64    ? launch_float32_forward<64>(params)
         : params.head_dim <= 128 ? launch_float32_forward<128>(params)
                                  : launch_float32_forward<256>(params);
}

int32_t backward_float32(const AttentionBackwardParams& params) {
  return params.head_dim <= 64    ? launch_float32_backward<64>(params)
         : params.head_dim <= 128 ? launch_float32_backward<128>(params)
                                  : launch_float32_backward<256>(params);
}

}  // namespace selfforcing::attention_cuda
