// How an op.cpp calls its kernels: the same lines for both shared objects, CPU and (with SELFFORCING_WITH_CUDA) CUDA.
#pragma once
#include <array>

#include "checks.h"

// The function of this shared object: SELFFORCING_KERNEL(rope_3d) is rope_3d_cpu or rope_3d_cuda.
#ifdef SELFFORCING_WITH_CUDA
#define SELFFORCING_KERNEL(NAME) NAME##_cuda
#define SELFFORCING_DISPATCH_KEY CUDA
#else
#define SELFFORCING_KERNEL(NAME) NAME##_cpu
#define SELFFORCING_DISPATCH_KEY CPU
#endif

namespace selfforcing {

// Calls the kernel with what it runs on: torch's threads, or the current stream of the device of `like`.
template <typename Params, typename Kernel>
void run_kernel([[maybe_unused]] const char* op, Kernel kernel, Params& params, [[maybe_unused]] const Tensor& like) {
#ifdef SELFFORCING_WITH_CUDA
  const CudaStreamGuard guard(like);
  params.stream = guard.stream();
  check_launch(kernel(params), op);
#else
  params.parallel = torch_threads();
  kernel(params);
#endif
}

// Uninitialised float32, on the device of `like`.
template <size_t rank>
Tensor empty_floats(const std::array<int64_t, rank>& size, const Tensor& like) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

// For gradients, whose strides are autograd's choice (that of a sum has stride 0): a copy unless rows are contiguous.
inline Tensor with_contiguous_last_dim(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool contiguous = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return contiguous ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace selfforcing
