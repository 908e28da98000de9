// Entry points of attention on the GPU.
#include <cstdlib>
#include <cstring>

#include "../ptx/launch.cuh"
#include "cuda_dispatch.h"
#include "cuda_hopper_fit.h"

namespace selfforcing {
namespace {

#ifdef SELFFORCING_WITH_HOPPER
constexpr bool kWithHopper = true;
#else
constexpr bool kWithHopper = false;
#endif

// The kernels for Hopper serve those who ask for them: docs/performance.md says why. Asked at every call, so that one
// process can time both ways.
bool asks_for_hopper() {
  const char* const asked = std::getenv("SELFFORCING_HOPPER");
  return asked != nullptr && std::strcmp(asked, "1") == 0 && ptx::compute_capability() == 90;
}

bool forward_uses_hopper(const AttentionParams& params) {
  return attention_cuda::fits_hopper_forward(params) && asks_for_hopper();
}

bool backward_uses_hopper(const AttentionBackwardParams& params) {
  return attention_cuda::fits_hopper_backward(params) && asks_for_hopper();
}

}  // namespace

int64_t attention_forward_workspace_bytes_cuda(const AttentionParams& params) {
  if constexpr (kWithHopper)
    if (forward_uses_hopper(params)) return attention_cuda::hopper_forward_workspace_bytes(params);
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::forward_workspace_bytes_bfloat16(params);
    case DType::float16: return attention_cuda::forward_workspace_bytes_float16(params);
    default: return 0;
  }
}

int64_t attention_backward_workspace_bytes_cuda(const AttentionBackwardParams& params) {
  if constexpr (kWithHopper)
    if (backward_uses_hopper(params)) return attention_cuda::hopper_backward_workspace_bytes(params);
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::backward_workspace_bytes_bfloat16(params);
    case DType::float16: return attention_cuda::backward_workspace_bytes_float16(params);
    default: return 0;
  }
}

int32_t attention_forward_cuda(const AttentionParams& params) {
  if constexpr (kWithHopper)
    if (forward_uses_hopper(params)) return attention_cuda::hopper_forward(params);
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::forward_bfloat16(params);
    case DType::float16: return attention_cuda::forward_float16(params);
    default: return attention_cuda::forward_float32(params);
  }
}

int32_t attention_backward_cuda(const AttentionBackwardParams& params) {
  if constexpr (kWithHopper)
    if (backward_uses_hopper(params)) return attention_cuda::hopper_backward(params);
  switch (params.dtype) {
    case DType::bfloat16: return attention_cuda::backward_bfloat16(params);
    case DType::float16: return attention_cuda::backward_float16(params);
    default: return attention_cuda::backward_float32(params);
  }
}

}  // namespace selfforcing
