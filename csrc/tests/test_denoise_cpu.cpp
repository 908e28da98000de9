// The CPU denoising steps against the definition (denoise_problems.h).
#include "cpu_test.h"
#include "denoise_problems.h"

int main() {
  using namespace selfforcing;
  const denoise_test::Kernels kernels{denoise_cpu, denoise_backward_cpu, add_noise_cpu,
                                      dmd_gradient_workspace_floats_cpu, dmd_gradient_cpu};
  return kernel_test::run_cpu_test([&] {
    denoise_test::check_all(kernels, {2, 5});
    return kernel_test::report();
  });
}
