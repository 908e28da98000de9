// Entry points of attention on the GPU.
#include "cuda_dispatch.h"

namespace selfforcing {

int64_t attention_forward_workspace_bytes_cuda(const AttentionParams& params) {
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::forward_workspace_bytes_bfloat16(params);
    case DType::float16: return attention_cuda::forward_workspace_bytes_float16(params);
    default: return 0;
  }
}

int64_t attention_backward_workspace_bytes_cuda(const AttentionBackwardParams&) { return 0; }

int32_t attention_forward_cuda(const AttentionParams& params) {
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::forward_bfloat16(params);
    case DType::float16: return attention_cuda::forward_float16(params);
    default: return attention_cuda::forward_float32(params);
  }
}

int32_t attention_backward_cuda(const AttentionBackwardParams& params) {
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::backward_bfloat16(params);
    case DType::float16: return attention_cuda::backward_float16(params);
    default: return attention_cuda::backward_float32(params);
  }
}

}  // namespace selfforcing
