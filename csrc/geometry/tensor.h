// What a kernel knows of a tensor: where it starts, how far apart its tokens are, what its elements are.
// No torch here: op.cpp fills these once, kernels on the CPU and on the GPU read them.
#pragma once
#include <cstdint>

namespace selfforcing {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// [B, L, H, D] with a contiguous last dimension; strides in elements.
template <typename Pointer>
struct Heads {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

using ConstHeads = Heads<const void*>;
using MutableHeads = Heads<void*>;

}  // namespace selfforcing
