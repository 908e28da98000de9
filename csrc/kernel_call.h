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

// Uninitialised and contiguous, on the device of `like`. Straight from the C shim: torch::stable::new_empty, which
// looks its schema up by name at every call, takes several times as long.
inline Tensor new_tensor(const int64_t* size, int64_t rank, int32_t dtype, const Tensor& like) {
  constexpr int64_t kMaxRank = 5;
  check(rank <= kMaxRank, "a result has ", rank, " dimensions, but at most ", kMaxRank, " are allocated");
  int64_t strides[kMaxRank], elements = 1;
  for (int64_t dim = rank - 1; dim >= 0; --dim) {
    strides[dim] = elements;
    elements *= size[dim] > 1 ? size[dim] : 1;
  }
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, size, strides, dtype, device_type, device_index, &tensor));
  return Tensor(tensor);
}

// In the dtype of `like`.
template <typename Size>
Tensor new_tensor(const Size& size, const Tensor& like) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(size.data(), static_cast<int64_t>(size.size()), dtype, like);
}

// In float32.
template <size_t rank>
Tensor empty_floats(const std::array<int64_t, rank>& size, const Tensor& like) {
  return new_tensor(size.data(), rank, aoti_torch_dtype_float32(), like);
}

// Scratch memory.
inline Tensor empty_bytes(int64_t bytes, const Tensor& like) {
  return new_tensor(&bytes, 1, aoti_torch_dtype_uint8(), like);
}

// For gradients, whose strides are autograd's choice (that of a sum has stride 0): a copy unless rows are contiguous.
inline Tensor with_contiguous_last_dim(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool contiguous = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return contiguous ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace selfforcing
