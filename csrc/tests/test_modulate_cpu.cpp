// The CPU modulation against the definition (modulate_problems.h).
#include "cpu_test.h"
#include "modulate_problems.h"

int main() {
  using namespace selfforcing;
  const modulate_test::Kernels kernels{
      modulated_layer_norm_cpu, modulated_layer_norm_backward_workspace_floats_cpu, modulated_layer_norm_backward_cpu,
      gated_residual_cpu,       gated_residual_backward_workspace_floats_cpu,       gated_residual_backward_cpu};
  return kernel_test::run_cpu_test([&] {
    modulate_test::check_all(kernels, {2, 5});
    return kernel_test::report();
  });
}
