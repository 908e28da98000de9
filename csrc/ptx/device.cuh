// The CUDA that kernels are written in, for two compilers: nvcc, and g++ with the emulation in tests/cuda_emulation,
// which runs the same kernel sources on the CPU. Kernel files include this instead of the CUDA headers.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declares `name`, the block's dynamic shared memory, aligned so that every swizzle starts with it (swizzle.cuh).
#define SELFFORCING_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#else
#include "emulation.h"
#endif

namespace selfforcing::ptx {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Shared memory that one block may ask for on every GPU since Ampere (compute capability 8.6 and 8.9 have the least).
constexpr int kMaxSharedBytes = 99 * 1024;
// The same on compute capability 9.0.
constexpr int kMaxSharedBytesHopper = 227 * 1024;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  return __float2half(x);
}

// prmt (PTX ISA, "Data Movement and Conversion Instructions: prmt"): four of the eight bytes of `low` and, from number
// 4 on, `high`, named by the digits of `selector`, the lowest first. nvcc does not make it out of shifts and masks.
__device__ __forceinline__ unsigned select_bytes(unsigned low, unsigned high, unsigned selector) {
#ifdef __CUDACC__
  return __byte_perm(low, high, selector);
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned selected = 0;
  for (int i = 0; i < 4; ++i) selected |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return selected;
#endif
}

// Sum over the warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

}  // namespace selfforcing::ptx
