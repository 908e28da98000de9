// One way to launch a kernel, under nvcc and under the emulation (which has no <<<>>>).
#pragma once
#include <cstddef>
#include <utility>

#include "device.cuh"

namespace selfforcing::ptx {

// Launches kernel(arguments...) on the stream and returns the error as cudaError_t (0 is success). An empty grid is no
// error: there is nothing to do.
template <typename... Parameters, typename... Arguments>
int32_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
               Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 48 * 1024;  // CUDA C++ Programming Guide, "Shared Memory", compute capability 8.x
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return static_cast<int32_t>(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();
  return static_cast<int32_t>(error != cudaSuccess ? error : last);
#else
  emulation::launch(kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
  return 0;
#endif
}

// Multiprocessors of the current device.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 1;
#else
  return emulation::kMultiprocessors;
#endif
}

// Of the current device, major and minor version as two digits; 0 under the emulation.
inline int compute_capability() {
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return 0;
  return 10 * major + minor;
#else
  return 0;
#endif
}

}  // namespace selfforcing::ptx
