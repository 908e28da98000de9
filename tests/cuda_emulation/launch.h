// A CUDA kernel's launch function as the tests want it: an error of the launch is an exception.
#pragma once
#include <stdexcept>
#include <string>

#include "emulation.h"

namespace selfforcing::emulation {

template <auto launch_kernel, typename Params>
void launch(const Params& params) {
  const int error = launch_kernel(params);
  if (error != 0) throw std::runtime_error("launch failed with cudaError_t " + std::to_string(error));
}

}  // namespace selfforcing::emulation
