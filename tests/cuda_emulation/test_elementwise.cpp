// The CUDA kernels of rope, denoise and modulate, emulated, against the definitions that the CPU kernels are tested
// with: aligned to 16 bytes and not, with and without gaps between rows, threads of a block in two orders.
#include "../../csrc/rope/cuda_turns.cuh"
#include "../../csrc/tests/denoise_problems.h"
#include "../../csrc/tests/modulate_problems.h"
#include "../../csrc/tests/rope_problems.h"
#include "launch.h"

namespace {

using namespace selfforcing;

// Cosines and sines of all pairs at positions near and far, against long double: within a unit in the last place,
// beside what the frequency, a double, is off by.
void check_turns() {
  constexpr int64_t kFrames = 3, kRows = 4, kColumns = 5;
  constexpr double kFrequency = 0x1p-50;
  for (int32_t head_dim = 2; head_dim <= 256; head_dim += 2)
    for (const int32_t start : {0, 700, 123456, -30}) {
      RopeParams p;
      p.head_dim = head_dim, p.axes = RopeAxes(kFrames, kRows, kColumns, head_dim);
      p.start_frame = &start, p.num_starts = 1, p.inverse = start == 700;
      double worst = 0;
      for (int64_t token = 0; token < p.axes.num_tokens(); ++token) {
        const TokenPosition place(p, 0, token);
        const int64_t position[] = {start + token / (kRows * kColumns), token / kColumns % kRows, token % kColumns};
        for (int axis = 0, pair = 0; axis < 3; ++axis)
          for (int32_t j = 0; j < p.axes.pairs[axis]; ++j, ++pair) {
            const long double power = std::pow(10000.0L, -static_cast<long double>(j) / p.axes.pairs[axis]);
            const long double angle = (p.inverse ? -1 : 1) * position[axis] * power;
            const auto error = [&](float actual, long double exact) {
              const double last_place = exact == 0 ? 0x1p-149 : std::ldexp(1.0, std::ilogb(exact) - 23);
              return static_cast<double>(std::fabs(actual - exact)) / (last_place + kFrequency * std::fabs(angle));
            };
            const float2 turn = place.turn(pair);
            worst = std::fmax(worst, std::fmax(error(turn.x, std::cos(angle)), error(turn.y, std::sin(angle))));
          }
      }
      kernel_test::expect(worst < 1, "turns of heads of " + std::to_string(head_dim) + " from frame " +
                                         std::to_string(start) + " are off by " + std::to_string(worst));
    }
}

}  // namespace

int main() {
  using emulation::launch;
  check_turns();
  const denoise_test::Kernels denoise{launch<denoise_cuda>, launch<denoise_backward_cuda>, launch<add_noise_cuda>,
                                      dmd_gradient_workspace_floats_cuda, launch<dmd_gradient_cuda>};
  const modulate_test::Kernels modulate{launch<modulated_layer_norm_cuda>,
                                        modulated_layer_norm_backward_workspace_floats_cuda,
                                        launch<modulated_layer_norm_backward_cuda>,
                                        launch<gated_residual_cuda>,
                                        gated_residual_backward_workspace_floats_cuda,
                                        launch<gated_residual_backward_cuda>};
  const rope_test::Kernels rope{nullptr, launch<rope_3d_cuda>, launch<qk_norm_rope_cuda>,
                                qk_norm_rope_backward_workspace_floats_cuda, launch<qk_norm_rope_backward_cuda>};
  for (const emulation::Order order : {emulation::Order::forward, emulation::Order::random}) {
    emulation::set_order(order);
    denoise_test::check_all(denoise, {});
    modulate_test::check_all(modulate, {});
    rope_test::check_all(rope, {});
  }
  return kernel_test::report() ? 0 : 1;
}
