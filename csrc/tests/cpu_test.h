// What the tests of the CPU kernels share. The instruction set is read once per process from SELFFORCING_CPU_ISA, so
// CTest runs each program once per set.
#pragma once
#include <cstdio>
#include <exception>

#include "../simd/isa.h"

namespace selfforcing::kernel_test {

// Calls test(), which says whether all went well, under the active instruction set. Returns the exit status: 77, which
// CTest takes for skipped, where the machine lacks the set that SELFFORCING_CPU_ISA names.
template <typename Test>
int run_cpu_test(const Test& test) {
  constexpr int kSkippedByCTest = 77;
  try {
    std::printf("instruction set: %s\n", isa_name(active_isa()));
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return kSkippedByCTest;
  }
  return test() ? 0 : 1;
}

}  // namespace selfforcing::kernel_test
