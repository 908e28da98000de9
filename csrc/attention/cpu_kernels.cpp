// Attention kernels on the CPU, compiled once per instruction set.
#include "cpu_backward.h"
#include "cpu_forward.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

int64_t attention_forward_workspace_bytes(const AttentionParams& params) {
  AttentionParams sizes = params;
  sizes.workspace = nullptr;
  int64_t bytes = 0;
  with_element(params.dtype, [&](auto element) { bytes = plan_forward<Operand<decltype(element)>>(sizes).bytes; });
  return bytes;
}

void attention_forward(const AttentionParams& params) {
  with_element(params.dtype, [&](auto element) { forward<Operand<decltype(element)>>(params); });
}

int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params) {
  AttentionBackwardParams sizes = params;
  sizes.workspace = nullptr;
  int64_t bytes = 0;
  with_element(params.dtype, [&](auto element) { bytes = plan_backward<Operand<decltype(element)>>(sizes).bytes; });
  return bytes;
}

void attention_backward(const AttentionBackwardParams& params) {
  with_element(params.dtype, [&](auto element) { backward<Operand<decltype(element)>>(params); });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
