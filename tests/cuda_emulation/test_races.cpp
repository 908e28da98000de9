// The race checker finds races: kernels with a planted one are reported, their repaired twins are not. Built with
// ThreadSanitizer only.
#include <cstdio>
#include <vector>

#include "../../csrc/ptx/launch.cuh"
#include "../../csrc/ptx/mma.cuh"

namespace {

int reports = 0;

}  // namespace

// The run-time calls this one if the program exports it.
extern "C" __attribute__((visibility("default"))) void __tsan_on_report(void* /*report*/) { ++reports; }

namespace {

using namespace selfforcing;

constexpr int kThreads = 64, kRounds = 3;
constexpr int kSlots = 8, kSlotBytes = 16 * kThreads;  // a piece of shared memory each: an address is reported once

enum class Bug { none, planted };

// A neighbour's value, with or without a barrier before it is read.
template <Bug kBug>
__global__ void read_neighbour(int slot, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = 1.0f;
  if constexpr (kBug == Bug::none) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

// A neighbour's copy: waiting for copies orders a thread's own alone.
template <Bug kBug>
__global__ void read_copy_of_neighbour(int slot, const float* from, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  ptx::copy_async(ptx::shared_address(shared) + threadIdx.x * 16, from + threadIdx.x * 4, 16);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  if constexpr (kBug == Bug::none) __syncthreads();
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[(threadIdx.x * 4 + 4) % (4 * kThreads)];
}

// A buffer is filled again, with or without a barrier after the others have read it.
template <Bug kBug>
__global__ void reuse_buffer(int slot, const float* from, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  for (int round = 0; round < kRounds; ++round) {
    ptx::copy_async(ptx::shared_address(shared) + threadIdx.x * 16, from + threadIdx.x * 4, 16);
    ptx::commit_copies();
    ptx::wait_for_copies<0>();
    __syncthreads();
    out[threadIdx.x] += reinterpret_cast<float*>(shared)[(threadIdx.x * 4 + 4) % (4 * kThreads)];
    if constexpr (kBug == Bug::none) __syncthreads();
  }
}

// Matrices whose rows another warp wrote.
template <Bug kBug>
__global__ void load_rows_of_other_warp(int slot, unsigned* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  const int row = static_cast<int>(threadIdx.x + ptx::kWarpSize) % kThreads;
  for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(shared)[threadIdx.x * 8 + i] = static_cast<uint16_t>(i);
  if constexpr (kBug == Bug::none) __syncthreads();
  unsigned registers[4];
  ptx::load_matrices(registers, ptx::shared_address(shared) + row * 16);
  out[threadIdx.x] = registers[0];
}

int failed = 0, next_slot = 0;

template <typename Kernel, typename... Arguments>
void expect_reports(bool some, const char* what, Kernel kernel, Arguments... arguments) {
  const int before = reports;
  ptx::launch(kernel, dim3(1), dim3(kThreads), kSlots * kSlotBytes, nullptr, next_slot++, arguments...);
  const bool right = (reports > before) == some;
  failed += !right;
  std::printf("%s  %s: %d reports\n", right ? "ok    " : "FAILED", what, reports - before);
}

}  // namespace

int main() {
  std::vector<float> from(4 * kThreads, 1.0f), out(kThreads);
  std::vector<unsigned> registers(kThreads);
  const float* source = from.data();
  expect_reports(false, "a neighbour's value after a barrier", read_neighbour<Bug::none>, out.data());
  expect_reports(true, "a neighbour's value without a barrier", read_neighbour<Bug::planted>, out.data());
  expect_reports(false, "a neighbour's copy after a barrier", read_copy_of_neighbour<Bug::none>, source, out.data());
  expect_reports(true, "a neighbour's copy without a barrier", read_copy_of_neighbour<Bug::planted>, source,
                 out.data());
  expect_reports(false, "a buffer filled again after a barrier", reuse_buffer<Bug::none>, source, out.data());
  expect_reports(true, "a buffer filled again without a barrier", reuse_buffer<Bug::planted>, source, out.data());
  expect_reports(false, "another warp's rows after a barrier", load_rows_of_other_warp<Bug::none>, registers.data());
  expect_reports(true, "another warp's rows without a barrier", load_rows_of_other_warp<Bug::planted>,
                 registers.data());
  return failed == 0 ? 0 : 1;
}
