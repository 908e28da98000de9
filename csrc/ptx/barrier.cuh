// Barriers of some of a block's threads and of asynchronous copies (PTX ISA, "Parallel Synchronization and
// Communication Instructions: mbarrier" and "bar"; the wrappers are for sm_90a alone).
//
// An mbarrier is 8 bytes of shared memory, aligned to 8. Its phase ends when as many threads have arrived as it was
// initialised with and as many bytes as were expected have been copied; then the next phase begins. The first phase has
// parity 0. Who waits for a parity goes on once the phase with that parity has ended: waiting for parity 1 of a new
// barrier returns at once.
#pragma once
#include "async_copy.cuh"

namespace selfforcing::ptx {

#ifdef __CUDACC__

// Instructions of Hopper alone. Code for other GPUs may name them, but does not get that far.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SELFFORCING_HOPPER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define SELFFORCING_HOPPER_ASM(...) __trap()
#endif

// One thread initialises; fence_barrier_init by that thread, then a barrier of the block, show it to everybody.
__device__ __forceinline__ void barrier_init(SharedAddress barrier, int arrivals) {
  SELFFORCING_HOPPER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// %globaltimer ("Special Registers"), its lower half: it starts anew every 4.3 seconds.
__device__ __forceinline__ unsigned global_nanoseconds() {
  unsigned now;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(now));
  return now;
}

// Makes barriers that this thread initialised visible to copies too.
__device__ __forceinline__ void fence_barrier_init() {
  SELFFORCING_HOPPER_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
}

// This thread arrives, and what it did before happens before what the waiting threads do after.
__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  SELFFORCING_HOPPER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same; the phase also has to wait for `bytes` more bytes of copies.
__device__ __forceinline__ void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  SELFFORCING_HOPPER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                         "r"(bytes) : "memory");
}

// Whether the phase has ended; the thread is suspended for a while before it hears that it has not.
__device__ __forceinline__ bool barrier_try_wait(SharedAddress barrier, unsigned parity) {
  unsigned ended = 1;
  SELFFORCING_HOPPER_ASM(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}" : "=r"(ended) : "r"(barrier),
      "r"(parity) : "memory");
  return ended != 0;
}

// A wait that does not end is a bug, and a kernel that hangs keeps the GPU and says nothing. So this one ends, after
// two seconds, by a store to address 0: an error of the process. (__trap() would end it, too, but where a path ends the
// compiler lets products of warpgroups wait for each other and spills registers.)
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, unsigned parity) {
  constexpr unsigned kMostNanoseconds = 2'000'000'000;
  unsigned start = 0;
  while (!barrier_try_wait(barrier, parity)) {
    const unsigned now = global_nanoseconds() | 1;
    if (start == 0) start = now;
    asm volatile(
        "{\n"
        ".reg .pred late;\n"
        "setp.gt.u32 late, %0, %1;\n"
        "@late st.global.u32 [%2], %0;\n"
        "}" ::"r"(now - start),
        "n"(kMostNanoseconds), "l"(0ll)
        : "memory");
  }
}

// bar.sync: `threads` of the block, whole warps, meet; id 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  SELFFORCING_HOPPER_ASM("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// bar.arrive: counts as one of them without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  SELFFORCING_HOPPER_ASM("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Ordinary stores of this thread to shared memory come before what copies and products of warpgroups read there after
// the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
  SELFFORCING_HOPPER_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}

#else

inline void barrier_init(SharedAddress barrier, int arrivals, EmulationSite where = EmulationSite::current()) {
  emulation::barrier_init(barrier, arrivals, where);
}
inline void fence_barrier_init() { emulation::fence_barrier_init(); }
inline void barrier_arrive(SharedAddress barrier, EmulationSite where = EmulationSite::current()) {
  emulation::barrier_arrive(barrier, 0, where);
}
inline void barrier_arrive_expect(SharedAddress barrier, int bytes, EmulationSite where = EmulationSite::current()) {
  emulation::barrier_arrive(barrier, bytes, where);
}
inline void barrier_wait(SharedAddress barrier, unsigned parity, EmulationSite where = EmulationSite::current()) {
  emulation::barrier_wait(barrier, parity, where);
}
inline void named_barrier_sync(int id, int threads, EmulationSite where = EmulationSite::current()) {
  emulation::named_barrier(id, threads, true, where);
}
inline void named_barrier_arrive(int id, int threads, EmulationSite where = EmulationSite::current()) {
  emulation::named_barrier(id, threads, false, where);
}
inline void fence_async_proxy() { emulation::fence_async_proxy(); }

#endif

}  // namespace selfforcing::ptx
