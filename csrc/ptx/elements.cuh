// Elementwise kernels see kWidth consecutive elements per thread: 16-byte accesses when kWidth elements fill them (the
// caller then guarantees alignment), one by one otherwise.
#pragma once
#include "../geometry/tensor.h"
#include "vector.cuh"

namespace selfforcing::ptx {

template <typename T, int kWidth>
__device__ __forceinline__ void load_elements(const T* from, float (&values)[kWidth]) {
  if constexpr (kWidth % kVector<T> == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kVector<T>) {
      T elements[kVector<T>];
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      memcpy(elements, &bits, sizeof(bits));
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) values[i + j] = to_float(elements[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(from[i]);
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_elements(T* to, const float (&values)[kWidth]) {
  if constexpr (kWidth % kVector<T> == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kVector<T>) {
      T elements[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) elements[j] = from_float<T>(values[i + j]);
      uint4 bits;
      memcpy(&bits, elements, sizeof(bits));
      store_16_bytes(to + i, bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = from_float<T>(values[i]);
  }
}

// Moves the bits of kWidth elements.
template <int kWidth, typename T>
__device__ __forceinline__ void copy_elements(T* to, const T* from) {
  if constexpr (kWidth % kVector<T> == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kVector<T>) store_16_bytes(to + i, *reinterpret_cast<const uint4*>(from + i));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = from[i];
  }
}

// Whether every address that a pointer and multiples of its strides (in elements) reach is a multiple of 16 bytes.
template <typename T, typename... Strides>
bool wide_access(const void* data, Strides... strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides * int64_t{sizeof(T)} % 16 == 0) && ... && true);
}

// Returns call(T{}) with the CUDA type of dtype.
template <typename Call>
int32_t with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::bfloat16: return call(bfloat16{});
    case DType::float16: return call(float16{});
    default: return call(float{});
  }
}

}  // namespace selfforcing::ptx
