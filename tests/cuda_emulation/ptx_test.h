// What tests of instructions share: for g++ with the emulation, and for nvcc with a GPU.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "../../csrc/ptx/launch.cuh"

namespace {

using namespace selfforcing;
using ptx::bfloat16;
using ptx::float16;

int passed = 0, failed = 0;

void expect(bool right, const char* what) {
  right ? ++passed : ++failed;
  if (!right) std::printf("FAILED  %s\n", what);
}

// Memory that both the kernels and this program see.
template <typename T>
class Shared {
 public:
  explicit Shared(size_t size) : size_(size) {
#ifdef __CUDACC__
    if (cudaMallocManaged(&data_, size * sizeof(T)) != cudaSuccess) std::abort();
#else
    data_ = static_cast<T*>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16));
#endif
  }
  ~Shared() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

template <typename... Parameters, typename... Arguments>
void run(void (*kernel)(Parameters...), int threads, size_t shared_bytes, Arguments... arguments) {
  bool right =
      ptx::launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), shared_bytes, nullptr, arguments...) == 0;
#ifdef __CUDACC__
  right = right && cudaDeviceSynchronize() == cudaSuccess;
#endif
  expect(right, "a kernel runs");
}

}  // namespace
