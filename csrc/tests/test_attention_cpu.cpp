// The CPU attention against its definition (attention_problems.h). The instruction set is read once per process from
// SELFFORCING_CPU_ISA, so CTest runs this program once per set.
#include <cstdio>
#include <exception>

#include "../simd/isa.h"
#include "attention_problems.h"

int main() {
  using namespace selfforcing;
  constexpr int kSkippedByCTest = 77;
  try {
    std::printf("instruction set: %s\n", isa_name(active_isa()));
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return kSkippedByCTest;
  }
  const attention_test::Kernels kernels{attention_forward_workspace_bytes_cpu, attention_forward_cpu,
                                        attention_backward_workspace_bytes_cpu, attention_backward_cpu};
  int count = 0;
  for (const attention_test::Case& c : attention_test::cases())
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      attention_test::check(attention_test::Problem(c, dtype, ++count), kernels, {2, 5});
  return attention_test::report(count) ? 0 : 1;
}
