// The CUDA attention kernels, emulated, against the definition that the CPU kernels are tested with. Every other launch
// runs the threads of a block in another order, so each repeat that `check` compares bit for bit has seen two of them.
//   test_attention [largest number of multiplications in a problem]
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>

#include "../../csrc/tests/attention_problems.h"
#include "emulation.h"

namespace {

using namespace selfforcing;

void change_order() {
  static unsigned launches = 0;
  constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::random,
                                          emulation::Order::reverse};
  emulation::set_order(kOrders[launches % 3], launches);
  ++launches;
}

void check_error(int32_t error) {
  if (error != 0) throw std::runtime_error("launch failed with cudaError_t " + std::to_string(error));
}

double multiplications(const attention_test::Case& c) {
  double keys = c.num_keys;
  for (const attention_test::Intervals& list : c.past)
    for (auto [start, end] : list) keys += end - start;
  return keys * c.batch * c.heads * c.num_queries() * c.dim;
}

}  // namespace

int main(int argc, char** argv) {
  const double most = argc > 1 ? std::atof(argv[1]) : std::numeric_limits<double>::infinity();
  const attention_test::Kernels kernels{attention_forward_workspace_bytes_cuda,
                                        [](const AttentionParams& params) {
                                          change_order();
                                          check_error(attention_forward_cuda(params));
                                        },
                                        attention_backward_workspace_bytes_cuda,
                                        [](const AttentionBackwardParams& params) {
                                          change_order();
                                          check_error(attention_backward_cuda(params));
                                        }};
  int count = 0, left_out = 0;
  for (const attention_test::Case& c : attention_test::cases())
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      const attention_test::Problem problem(c, dtype, ++count);
      if (multiplications(c) > most) {
        ++left_out;
        continue;
      }
      try {
        attention_test::check(problem, kernels, {});
      } catch (const std::exception& error) {
        attention_test::fail(problem, error.what());
      }
    }
  if (left_out > 0) std::printf("%d problems with more than %g multiplications left out\n", left_out, most);
  return attention_test::report(count - left_out) ? 0 : 1;
}
