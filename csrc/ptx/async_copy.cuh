// Copies from device memory to shared memory that pass no register and complete later (PTX ISA, "Data Movement and
// Conversion Instructions: Non-bulk copy"; since sm_80).
#pragma once
#include "device.cuh"

namespace selfforcing::ptx {

#ifdef __CUDACC__

// Where something is in shared memory, as instructions want it: 32 bits, so that an offset known to the compiler costs
// nothing.
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// cp.async.cg: 16 bytes, both ends aligned to 16; with `bytes` 0 the target becomes zero and the source is not read.
__device__ __forceinline__ void copy_async(SharedAddress target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// cp.async.ca: the same of 8 bytes, aligned to 8.
__device__ __forceinline__ void copy_async_8(SharedAddress target, const void* source, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

// cp.async.commit_group: this thread's copies since the last one form a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: all but the newest kGroups groups of this thread are complete; a barrier shows them to others.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#else

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* pointer) { return static_cast<unsigned char*>(pointer); }
inline void copy_async(SharedAddress target, const void* source, int bytes) {
  emulation::copy_async(target, source, 16, bytes);
}
inline void copy_async_8(SharedAddress target, const void* source, int bytes) {
  emulation::copy_async(target, source, 8, bytes);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  emulation::wait_for_copies(kGroups);
}

#endif

}  // namespace selfforcing::ptx
