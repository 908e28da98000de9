// The CPU rotary embedding against the definition (rope_problems.h).
#include "cpu_test.h"
#include "rope_problems.h"

int main() {
  using namespace selfforcing;
  const rope_test::Kernels kernels{rope_table_floats_cpu, rope_3d_cpu, qk_norm_rope_cpu,
                                   qk_norm_rope_backward_workspace_floats_cpu, qk_norm_rope_backward_cpu};
  return kernel_test::run_cpu_test([&] {
    rope_test::check_all(kernels, {2, 5});
    return kernel_test::report();
  });
}
