// The emulation finds what it is there to find: missed barriers, divergent warps, reads of what was never written,
// results that depend on the order of threads. A checker that cannot fail would prove nothing about the kernels.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ptx/launch.cuh"
#include "../../csrc/ptx/mma.cuh"
#include "test_emulation_hopper.h"

namespace {

using namespace selfforcing;

int passed = 0, failed = 0;

void expect(bool right, const char* what) {
  right ? ++passed : ++failed;
  if (!right) std::printf("FAILED  %s\n", what);
}

template <typename Kernel, typename... Arguments>
std::string error_of(Kernel kernel, dim3 block, Arguments... arguments) {
  try {
    ptx::launch(kernel, dim3(1), block, 64 * sizeof(float), nullptr, arguments...);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

__global__ void half_reach_the_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_different_barriers() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void half_a_warp_shuffles() {
  if (threadIdx.x < 16) __shfl_xor_sync(ptx::kFullWarp, 1, 1);
}

__global__ void shuffle_reads_absent_lane() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

// Each thread reads what its neighbour wrote, without waiting for it.
__global__ void read_neighbour_too_early(float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void read_neighbour(float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// Reads its own copy while kIncomplete groups may be on their way.
template <int kIncomplete>
__global__ void read_copy(const float* from, float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  ptx::copy_async(ptx::shared_address(shared) + threadIdx.x * 16, from, 16);
  ptx::commit_copies();
  ptx::wait_for_copies<kIncomplete>();
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x * 4];
  ptx::wait_for_copies<0>();
}

__global__ void end_before_copy(const float* from) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  ptx::copy_async(ptx::shared_address(shared), from, 16);
}

__global__ void half_a_warp_multiplies() {
  float sums[4] = {};
  const unsigned factors[4] = {};
  if (threadIdx.x < 16) ptx::multiply_add<ptx::bfloat16>(sums, factors, factors);
}

__global__ void rows_off_their_place() {
  SELFFORCING_DYNAMIC_SHARED(shared);
  unsigned registers[4];
  ptx::load_matrices(registers, ptx::shared_address(shared) + 2 * (threadIdx.x % 8));
}

__global__ void warp_operations(float* sum, unsigned* votes, int* from_below) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  sum[threadIdx.x] = ptx::warp_sum(static_cast<float>(threadIdx.x));
  votes[threadIdx.x] = __ballot_sync(ptx::kFullWarp, lane % 3 == 0);
  from_below[threadIdx.x] = __shfl_up_sync(ptx::kFullWarp, lane, 2) * 100 + __shfl_down_sync(ptx::kFullWarp, lane, 2);
}

__global__ void write_place(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y + thread] += static_cast<int>(block * 1000 + thread);
}

void test_detection() {
  expect(contains(error_of(half_reach_the_barrier, dim3(64)), "deadlock"), "threads that miss a barrier");
  expect(contains(error_of(two_different_barriers, dim3(64)), "while others wait"), "two different barriers");
  expect(contains(error_of(half_a_warp_shuffles, dim3(32)), "deadlock"), "lanes that miss a shuffle");
  expect(contains(error_of(shuffle_reads_absent_lane, dim3(32)), "takes no part"), "a shuffle from an absent lane");
}

void test_copies() {
  const float from[4] = {1, 2, 3, 4};
  float out[4] = {};
  expect(error_of(read_copy<0>, dim3(4), static_cast<const float*>(from), static_cast<float*>(out)).empty(),
         "a copy that was waited for");
  for (float value : out) expect(value == 1, "the value of a copy");
  expect(error_of(read_copy<1>, dim3(4), static_cast<const float*>(from), static_cast<float*>(out)).empty(),
         "a copy read too early is no deadlock");
  for (float value : out) expect(std::isnan(value), "a copy read too early shows as NaN");
  expect(contains(error_of(end_before_copy, dim3(1), static_cast<const float*>(from)), "ends before"),
         "a thread that ends before its copies");
  expect(contains(error_of(half_a_warp_multiplies, dim3(32)), "deadlock"), "lanes that miss a product");
  expect(contains(error_of(rows_off_their_place, dim3(32)), "not aligned"), "rows of a matrix that are not aligned");
}

void test_shared_memory() {
  for (const emulation::Order order :
       {emulation::Order::forward, emulation::Order::reverse, emulation::Order::random}) {
    emulation::set_order(order);
    std::vector<float> out(64);
    int wrong = 0;
    expect(error_of(read_neighbour_too_early, dim3(64), out.data()).empty(), "a race is no deadlock");
    for (float value : out) wrong += std::isnan(value);
    expect(wrong > 0, "a read before the write shows as NaN");
    expect(error_of(read_neighbour, dim3(64), out.data()).empty(), "a barrier that all threads reach");
    for (int i = 0; i < 64; ++i) expect(out[i] == static_cast<float>((i + 1) % 64), "values after a barrier");
  }
  emulation::set_order(emulation::Order::forward);
}

void test_warps() {
  constexpr int kThreads = 64;
  float sum[kThreads];
  unsigned votes[kThreads];
  int neighbours[kThreads];
  expect(error_of(warp_operations, dim3(kThreads), sum, votes, neighbours).empty(), "warp operations run");
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % 32;
    expect(sum[i] == static_cast<float>(i < 32 ? 496 : 1520), "the sum of a warp");
    expect(votes[i] == 0x49249249u, "the votes of a warp");
    expect(neighbours[i] == (lane < 2 ? lane : lane - 2) * 100 + (lane > 29 ? lane : lane + 2), "shifts along a warp");
  }
}

void test_places() {
  const dim3 grid(3, 2, 2), block(5, 4);
  std::vector<int> out(12 * 20);
  ptx::launch(write_place, grid, block, 0, nullptr, out.data());
  for (int i = 0; i < 240; ++i) expect(out[i] == i / 20 * 1000 + i % 20, "every thread of every block runs once");
}

// Every half, and every bfloat16, survives the way to float and back; the values between round to nearest even.
void test_narrow_floats() {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    const __nv_bfloat16 b{static_cast<uint16_t>(bits)};
    const float from_half = __half2float(h), from_bfloat16 = __bfloat162float(b);
    if (!std::isnan(from_half)) wrong += __float2half(from_half).bits != bits;
    if (!std::isnan(from_bfloat16)) wrong += __float2bfloat16(from_bfloat16).bits != bits;
  }
  expect(wrong == 0, "narrow floats survive a round trip");
  expect(__float2half(1.0f + 0x1p-11f).bits == 0x3c00 && __float2half(1.0f + 0x3p-11f).bits == 0x3c02, "ties to even");
  expect(__float2bfloat16(1.0f + 0x1p-8f).bits == 0x3f80 && __float2bfloat16(1.0f + 0x3p-8f).bits == 0x3f82,
         "ties to even in bfloat16");
  expect(__half2float(__float2half(65519.0f)) == 65504.0f && std::isinf(__half2float(__float2half(65520.0f))),
         "the largest half");
  expect(__float2half(0x1p-24f).bits == 1 && __float2half(0x1p-25f).bits == 0 && __float2half(0x3p-25f).bits == 2,
         "subnormal halves");
  expect(std::isnan(__half2float(__float2half(NAN))) && std::isnan(__bfloat162float(__float2bfloat16(NAN))),
         "NaN stays");
}

void test_hopper() {
  // An empty `part`: no error.
  const auto check = [](const std::string& error, const std::string& part, const char* what) {
    expect(part.empty() ? error.empty() : contains(error, part.c_str()), what);
    if (part.empty() ? !error.empty() : !contains(error, part.c_str())) std::printf("        %s\n", error.c_str());
  };
  for (const emulation::Order order :
       {emulation::Order::forward, emulation::Order::reverse, emulation::Order::random}) {
    emulation::set_order(order);
    hopper::test_barriers(check);
    hopper::test_copies(check);
    hopper::test_products(check);
  }
  emulation::set_order(emulation::Order::forward);
}

}  // namespace

int main() {
  test_detection();
  test_copies();
  test_shared_memory();
  test_warps();
  test_places();
  test_narrow_floats();
  test_hopper();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
