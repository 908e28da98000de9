// The CPU attention against its definition (attention_problems.h).
//   test_attention_cpu [largest number of multiplications in a problem]
#include <cstdlib>
#include <limits>

#include "attention_problems.h"
#include "cpu_test.h"

int main(int argc, char** argv) {
  using namespace selfforcing;
  const attention_test::Kernels kernels{attention_forward_workspace_bytes_cpu, attention_forward_cpu,
                                        attention_backward_workspace_bytes_cpu, attention_backward_cpu};
  const double most_multiplications = argc > 1 ? std::atof(argv[1]) : std::numeric_limits<double>::infinity();
  return kernel_test::run_cpu_test([&] { return attention_test::check_all(kernels, {2, 5}, most_multiplications); });
}
