// Plays CUDA for g++, so that kernels written for nvcc run on the CPU and are tested without a GPU: every CUDA thread
// of a block is a fiber; barriers and warp operations are rendezvous. csrc/ptx/device.cuh includes this where nvcc does
// not compile. It checks what a GPU would leave undefined: a barrier or a warp operation that some threads miss, and
// (shared memory starts as NaN, allocated to the byte) reads of what was never written.
//
// An asynchronous copy is NaN until its thread waits for it. The tensor cores' products are computed in float32. What
// is played of Hopper, and how its asynchronous instructions show bugs, says hopper.cpp.
//
// It does not play: several blocks at once, bank conflicts, timing.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <utility>

// ---- The language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time
#define __align__(bytes) alignas(bytes)
#define SELFFORCING_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::selfforcing::emulation::shared_memory())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- The machine

namespace selfforcing::emulation {

// In which order the threads of a block take turns. A kernel must not depend on it.
enum class Order { forward, reverse, random };
void set_order(Order order, unsigned seed = 1);

struct Thread {
  dim3 thread, block, block_size, grid_size;
  int lane, warp;
};
extern const Thread* current_thread;

// Few, so that small problems have both fewer and more thread blocks than that.
constexpr int kMultiprocessors = 4;

void* shared_memory();

// Runs the body once per thread of every block. Throws std::runtime_error where threads miss each other.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void* context), void* context);

void block_barrier(std::source_location where);

// All lanes of the mask meet; each gives a value and gets the one of `source_lane`. Then votes: bit i is lane i's
// `vote`.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, bool vote, unsigned* votes,
                  std::source_location where);

// cp.async: the target is NaN from here until wait_for_copies; `given_bytes` of `bytes` are read, the rest becomes
// zero.
void copy_async(void* target, const void* source, int bytes, int given_bytes);
void commit_copies();
void wait_for_copies(int newest_groups_left);

// ldmatrix and mma.m16n8k16 (csrc/ptx/mma.cuh), by all 32 lanes together.
void load_matrices(unsigned* to, const void* row, bool transposed, std::source_location where);
void multiply_add(float* sum, const unsigned* a, const unsigned* b, float (*to_float)(uint16_t),
                  std::source_location where);

// ---- Hopper (csrc/ptx/{barrier,bulk_copy,warpgroup}.cuh)

void barrier_init(void* barrier, int arrivals, std::source_location where);
void fence_barrier_init();
void barrier_arrive(void* barrier, int expected_bytes, std::source_location where);
void barrier_wait(void* barrier, unsigned parity, std::source_location where);
void named_barrier(int id, int threads, bool waits, std::source_location where);
void fence_async_proxy();

// A tensor of four dimensions, the first contiguous, and the box that a copy is of.
struct TensorMap {
  unsigned char* data;
  int element_bytes;
  int64_t sizes[4];
  int64_t strides[4];  // bytes, from dimension 1 on
  int box[4];
  int row_bytes;  // of the swizzle; 16: none
};
struct Coordinates {
  int of[4];
};
void load_tile(void* target, const TensorMap& map, void* barrier, Coordinates first, std::source_location where);
void store_tile(const TensorMap& map, const void* source, Coordinates first, std::source_location where);
void commit_stores();
void wait_for_stores_read(int newest_groups_left);

// A product of a warpgroup as each of its threads asks for it; `a` is nullptr where the left factor has a descriptor.
struct Product {
  float* sum;
  int columns;
  const unsigned* a;
  uint64_t a_descriptor, b_descriptor;
  bool a_transposed, b_transposed, accumulate;
  float (*to_float)(uint16_t);
};
// The address that a descriptor shall name, from the start of shared memory.
unsigned matrix_start(const void* start, int leading_bytes, int stride_bytes, std::source_location where);
void warpgroup_arrive();
void multiply_warpgroup(const Product& product, std::source_location where);
void commit_products();
void wait_for_products(int newest_groups_left);
void expect_complete(const float* sum);

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
            Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  run(
      grid, block, shared_bytes,
      [](void* context) {
        auto& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.parameters);
      },
      &call);
}

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, false, nullptr, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace selfforcing::emulation

#define threadIdx (::selfforcing::emulation::current_thread->thread)
#define blockIdx (::selfforcing::emulation::current_thread->block)
#define blockDim (::selfforcing::emulation::current_thread->block_size)
#define gridDim (::selfforcing::emulation::current_thread->grid_size)

// ---- Synchronisation and warp operations

using EmulationSite = std::source_location;

inline void __syncthreads(EmulationSite where = EmulationSite::current()) {
  selfforcing::emulation::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EmulationSite where = EmulationSite::current()) {
  selfforcing::emulation::shuffle(mask, 0, selfforcing::emulation::current_thread->lane, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, EmulationSite where = EmulationSite::current()) {
  return selfforcing::emulation::shuffle(mask, value, lane, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EmulationSite where = EmulationSite::current()) {
  return selfforcing::emulation::shuffle(mask, value, selfforcing::emulation::current_thread->lane ^ lanes, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, EmulationSite where = EmulationSite::current()) {
  const int lane = selfforcing::emulation::current_thread->lane;
  const int source = lane - static_cast<int>(lanes);
  return selfforcing::emulation::shuffle(mask, value, source < 0 ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, EmulationSite where = EmulationSite::current()) {
  const int lane = selfforcing::emulation::current_thread->lane;
  const int source = lane + static_cast<int>(lanes);
  return selfforcing::emulation::shuffle(mask, value, source > 31 ? lane : source, where);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, EmulationSite where = EmulationSite::current()) {
  unsigned votes = 0;
  selfforcing::emulation::exchange(mask, 0, selfforcing::emulation::current_thread->lane, vote, &votes, where);
  return votes;
}

// ---- Memory

template <typename T>
T __ldg(const T* address) {  // no thread writes what this one reads
  return *address;
}

// ---- Arithmetic

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
float __bfloat162float(__nv_bfloat16 x);
float __half2float(__half x);
__nv_bfloat16 __float2bfloat16(float x);  // rounds to nearest, ties to even
__half __float2half(float x);             // likewise
