// Functions that run on the CPU and on the GPU. Inlined by force: files compiled per instruction set include them, and
// a copy out of line from one of those must not be what the linker gives to all.
#pragma once

#ifdef __CUDACC__
#define SELFFORCING_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SELFFORCING_HOST_DEVICE inline __attribute__((always_inline))
#endif
