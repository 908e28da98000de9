// Attention on the CPU: hands the call to the kernels of the active instruction set.
#include "../simd/isa.h"
#include "params.h"

namespace selfforcing {

SELFFORCING_DECLARE_ISA(int64_t attention_forward_workspace_bytes(const AttentionParams& params))
SELFFORCING_DECLARE_ISA(void attention_forward(const AttentionParams& params))
SELFFORCING_DECLARE_ISA(int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params))
SELFFORCING_DECLARE_ISA(void attention_backward(const AttentionBackwardParams& params))

int64_t attention_forward_workspace_bytes_cpu(const AttentionParams& params) {
  SELFFORCING_DISPATCH(attention_forward_workspace_bytes, params);
}

void attention_forward_cpu(const AttentionParams& params) { SELFFORCING_DISPATCH(attention_forward, params); }

int64_t attention_backward_workspace_bytes_cpu(const AttentionBackwardParams& params) {
  SELFFORCING_DISPATCH(attention_backward_workspace_bytes, params);
}

void attention_backward_cpu(const AttentionBackwardParams& params) { SELFFORCING_DISPATCH(attention_backward, params); }

}  // namespace selfforcing
