// The CUDA kernels of rope, denoise and modulate, emulated, against the definitions that the CPU kernels are tested
// with: aligned to 16 bytes and not, with and without gaps between rows, threads of a block in two orders.
#include "../../csrc/tests/denoise_problems.h"
#include "../../csrc/tests/modulate_problems.h"
#include "../../csrc/tests/rope_problems.h"
#include "launch.h"

int main() {
  using namespace selfforcing;
  using emulation::launch;
  const denoise_test::Kernels denoise{launch<denoise_cuda>, launch<denoise_backward_cuda>, launch<add_noise_cuda>,
                                      dmd_gradient_workspace_floats_cuda, launch<dmd_gradient_cuda>};
  const modulate_test::Kernels modulate{launch<modulated_layer_norm_cuda>,
                                        modulated_layer_norm_backward_workspace_floats_cuda,
                                        launch<modulated_layer_norm_backward_cuda>,
                                        launch<gated_residual_cuda>,
                                        gated_residual_backward_workspace_floats_cuda,
                                        launch<gated_residual_backward_cuda>};
  const rope_test::Kernels rope{rope_table_floats_cuda, launch<rope_3d_cuda>, launch<qk_norm_rope_cuda>,
                                qk_norm_rope_backward_workspace_floats_cuda, launch<qk_norm_rope_backward_cuda>};
  for (const emulation::Order order : {emulation::Order::forward, emulation::Order::random}) {
    emulation::set_order(order);
    denoise_test::check_all(denoise, {});
    modulate_test::check_all(modulate, {});
    rope_test::check_all(rope, {});
  }
  return kernel_test::report() ? 0 : 1;
}
