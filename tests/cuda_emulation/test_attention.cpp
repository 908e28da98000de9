// The CUDA attention kernels, emulated, against the definition that the CPU kernels are tested with. Every other launch
// runs the threads of a block in another order, so each repeat that `check` compares bit for bit has seen two of them.
//   test_attention [largest number of multiplications in a problem]
#include <cstdlib>
#include <limits>

#include "../../csrc/tests/attention_problems.h"
#include "launch.h"

namespace {

using namespace selfforcing;

void change_order() {
  static unsigned launches = 0;
  constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::random,
                                          emulation::Order::reverse};
  emulation::set_order(kOrders[launches % 3], launches);
  ++launches;
}

}  // namespace

int main(int argc, char** argv) {
  const attention_test::Kernels kernels{attention_forward_workspace_bytes_cuda,
                                        [](const AttentionParams& params) {
                                          change_order();
                                          emulation::launch<attention_forward_cuda>(params);
                                        },
                                        attention_backward_workspace_bytes_cuda,
                                        [](const AttentionBackwardParams& params) {
                                          change_order();
                                          emulation::launch<attention_backward_cuda>(params);
                                        }};
  const double most_multiplications = argc > 1 ? std::atof(argv[1]) : std::numeric_limits<double>::infinity();
  return attention_test::check_all(kernels, {}, most_multiplications) ? 0 : 1;
}
