// The checks that every op.cpp makes, and what it takes from torch to fill its params. Each message names the argument,
// what it got and what it takes.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry/parallel.h"
#include "geometry/tensor.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it by its older name alone
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace selfforcing {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws the RuntimeError that Python sees: fail("attention: q has ", n, " heads, but ...").
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << ']';
  return text.str();
}

// Any size, in a list of sizes for check_shape.
constexpr int64_t kAnySize = -1;

// `layout` is the shape in words, such as "[B, L, H, D]".
inline void check_shape(const Tensor& tensor, const char* name, const char* layout,
                        std::initializer_list<int64_t> sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    if (!fits) break;
    fits = size == kAnySize || tensor.size(dim) == size;
    ++dim;
  }
  if (fits) return;
  std::ostringstream wanted;
  dim = 0;
  for (const int64_t size : sizes) {
    if (dim++ > 0) wanted << ", ";
    if (size == kAnySize)
      wanted << "any";
    else
      wanted << size;
  }
  fail(name, " has shape ", shape_text(tensor), ", but must be ", layout, " = [", wanted.str(), "]");
}

// Sizes that a kernel holds as int32.
inline int32_t size_int32(int64_t size, const char* name) {
  check(size <= std::numeric_limits<int32_t>::max(), name, " is ", size, ", but must be less than 2^31");
  return static_cast<int32_t>(size);
}

// float32, bfloat16 or float16, as the kernels name them.
inline DType check_float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: fail(name, " is ", dtype_name(tensor.scalar_type()), ", but must be float32, bfloat16 or float16");
  }
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
  check(tensor.scalar_type() == wanted, name, " is ", dtype_name(tensor.scalar_type()), ", but must be ",
        dtype_name(wanted));
}

inline void check_same_dtype(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check(tensor.scalar_type() == other.scalar_type(), name, " is ", dtype_name(tensor.scalar_type()), ", but must be ",
        dtype_name(other.scalar_type()), " like ", other_name);
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check(tensor.device() == other.device(), name, " is on ", device_text(tensor), ", but must be on ",
        device_text(other), " like ", other_name);
}

inline void check_last_dim_contiguous(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  check(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1 || tensor.numel() == 0), name, " has stride ",
        last >= 0 ? tensor.stride(last) : 0, " in its last dimension, but must have stride 1 there");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  check(tensor.is_contiguous(), name, " is not contiguous, but must be");
}

// int32, contiguous, on the device of `like`: the small tensors that say where things are.
inline void check_index_tensor(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  check_dtype(tensor, name, ScalarType::Int);
  check_same_device(tensor, name, like, like_name);
  check_contiguous(tensor, name);
}

// [B, L, H, D] whose last dimension is contiguous, as kernels see it.
inline ConstHeads const_heads(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline MutableHeads mutable_heads(Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// torch's own threads for CPU kernels.
inline Parallel torch_threads() {
  Parallel parallel;
  parallel.num_threads = static_cast<int32_t>(torch::stable::get_num_threads());
  parallel.run = [](int32_t num_workers, void (*body)(void* context, int32_t worker), void* context) {
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, static_cast<int32_t>(worker));
    });
  };
  return parallel;
}

#ifdef SELFFORCING_WITH_CUDA
// The device of a tensor made current, and its current stream.
class CudaStreamGuard {
 public:
  explicit CudaStreamGuard(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// `status` is a cudaError_t.
inline void check_launch(int32_t status, const char* op) {
  constexpr int32_t kNoKernelImageForDevice = 209;  // CUDA Runtime API, cudaError_t
  check(status != kNoKernelImageForDevice, op,
        ": this build has no kernels for this GPU; `python -m selfforcing_ext.info` says for which it has");
  check(status == 0, op, ": the CUDA launch failed with cudaError_t ", status);
}
#endif

}  // namespace selfforcing
