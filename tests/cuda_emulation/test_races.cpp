// The race checker finds races: kernels with a planted one are reported, their repaired twins are not. Built with
// ThreadSanitizer only.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ptx/bulk_copy.cuh"
#include "../../csrc/ptx/launch.cuh"
#include "../../csrc/ptx/mma.cuh"
#include "../../csrc/ptx/warpgroup.cuh"

namespace {

int reports = 0;

}  // namespace

// The run-time calls this one if the program exports it, in the thread that raced; it must not race itself.
extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void __tsan_on_report(void* /*report*/) {
  ++reports;
}

namespace {

using namespace selfforcing;

constexpr int kThreads = 64, kRounds = 3;
constexpr int kWarpgroup = 128, kWithWriter = kWarpgroup + ptx::kWarpSize;
constexpr int kSlots = 24, kSlotBytes = 4096;  // a piece of shared memory each: an address is reported once

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

// Half of the threads read what the other half wrote, once that has arrived at an mbarrier.
template <Bug kBug>
__global__ void hand_over_at_mbarrier(int slot, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  const ptx::SharedAddress full = ptx::shared_address(shared) + 2048;
  float* const values = reinterpret_cast<float*>(shared);
  constexpr unsigned kHalf = kThreads / 2;
  if (threadIdx.x == 0) ptx::barrier_init(full, kHalf);
  __syncthreads();
  if (threadIdx.x < kHalf) {
    values[threadIdx.x] = 1.0f;
    ptx::barrier_arrive(full);
  } else {
    if constexpr (kBug == Bug::none) ptx::barrier_wait(full, 0);
    out[threadIdx.x] = values[threadIdx.x - kHalf];
  }
}

// The same at a named barrier; the bug is that the readers do not wait there either.
template <Bug kBug>
__global__ void hand_over_at_named_barrier(int slot, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  float* const values = reinterpret_cast<float*>(all_shared + slot * kSlotBytes);
  constexpr unsigned kHalf = kThreads / 2;
  if (threadIdx.x < kHalf) {
    values[threadIdx.x] = 1.0f;
    ptx::named_barrier_arrive(1, kThreads);
  } else {
    if constexpr (kBug == Bug::none)
      ptx::named_barrier_sync(1, kThreads);
    else
      ptx::named_barrier_arrive(1, kThreads);
    out[threadIdx.x] = values[threadIdx.x - kHalf];
  }
}

// Two tiles and a barrier for each; the bug is to read the first one when the second one has come.
template <Bug kBug>
__global__ void read_tile(int slot, const __grid_constant__ ptx::TensorMap map, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  const ptx::SharedAddress start = ptx::shared_address(shared);
  const auto barrier = [&](int tile) { return start + 2048 + tile * 8; };
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < 2; ++tile) ptx::barrier_init(barrier(tile), 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int tile = 0; tile < 2; ++tile) {
      ptx::barrier_arrive_expect(barrier(tile), 16 * kThreads);
      ptx::load_tile(start + tile * 1024, map, barrier(tile), 0, 0, 0, 0);
    }
  if constexpr (kBug == Bug::none) ptx::barrier_wait(barrier(0), 0);
  ptx::barrier_wait(barrier(1), 0);
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
  if constexpr (kBug == Bug::planted) ptx::barrier_wait(barrier(0), 0);
}

// A tile is loaded again, with or without a barrier after the others have read it.
template <Bug kBug>
__global__ void load_tile_again(int slot, const __grid_constant__ ptx::TensorMap map, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  const ptx::SharedAddress start = ptx::shared_address(shared), full = start + 2048, empty = full + 8;
  if (threadIdx.x == 0) {
    ptx::barrier_init(full, 1);
    ptx::barrier_init(empty, kThreads);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (unsigned round = 0; round < kRounds; ++round) {
    if (threadIdx.x == 0) {
      if constexpr (kBug == Bug::none) ptx::barrier_wait(empty, round % 2 ^ 1);
      ptx::barrier_arrive_expect(full, 16 * kThreads);
      ptx::load_tile(start, map, full, 0, 0, 0, 0);
    }
    ptx::barrier_wait(full, round % 2);
    out[threadIdx.x] += reinterpret_cast<float*>(shared)[threadIdx.x];
    ptx::barrier_arrive(empty);
  }
}

// A warp writes the factors of a warpgroup's product, again after the warpgroup said it may: the bugs are that the
// product does not wait for the factors, and that the warpgroup says so before its product is complete.
enum class ProductBug { none, factors_not_awaited, released_too_early };

template <ProductBug kBug>
__global__ void write_factors(int slot, float* out) {
  SELFFORCING_DYNAMIC_SHARED(all_shared);
  unsigned char* const shared = all_shared + slot * kSlotBytes;
  constexpr int kLeftBytes = 64 * 32, kRightBytes = 32 * 32;
  const ptx::SharedAddress start = ptx::shared_address(shared), empty = start + kLeftBytes + kRightBytes;
  constexpr int kFull = 1;
  if (threadIdx.x == 0) ptx::barrier_init(empty, kWarpgroup);
  __syncthreads();
  if (threadIdx.x >= kWarpgroup) {
    for (unsigned round = 0; round < 2; ++round) {
      if (round > 0) ptx::barrier_wait(empty, 0);
      for (int i = static_cast<int>(threadIdx.x) - kWarpgroup; i < (kLeftBytes + kRightBytes) / 2; i += ptx::kWarpSize)
        reinterpret_cast<uint16_t*>(shared)[i] = 0;
      ptx::fence_async_proxy();
      ptx::named_barrier_arrive(kFull + static_cast<int>(round), kWithWriter);
    }
    return;
  }
  const ptx::MatrixDescriptor left = ptx::matrix_descriptor(start, 0, 256, ptx::Swizzle::bytes32);
  const ptx::MatrixDescriptor right = ptx::matrix_descriptor(start + kLeftBytes, 0, 256, ptx::Swizzle::bytes32);
  float sums[16];
  for (unsigned round = 0; round < 2; ++round) {
    const int full = kFull + static_cast<int>(round);
    if constexpr (kBug == ProductBug::factors_not_awaited)
      ptx::named_barrier_arrive(full, kWithWriter);
    else
      ptx::named_barrier_sync(full, kWithWriter);
    ptx::warpgroup_arrive(sums);
    ptx::multiply_add_shared<ptx::bfloat16, 32, false, false>(sums, left, right, false);
    ptx::warpgroup_commit();
    if (kBug == ProductBug::released_too_early && round == 0) ptx::barrier_arrive(empty);
    ptx::warpgroup_wait<0>(sums);
    if (kBug != ProductBug::released_too_early && round == 0) ptx::barrier_arrive(empty);
  }
  if (threadIdx.x < kThreads) out[threadIdx.x] = sums[0];
}

int failed = 0, next_slot = 0;

template <typename Kernel, typename... Arguments>
void expect_reports_of(int threads, bool some, const char* what, Kernel kernel, Arguments... arguments) {
  const int before = reports;
  std::string error;
  try {
    ptx::launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), kSlots * kSlotBytes, nullptr, next_slot++,
                arguments...);
  } catch (const std::runtime_error& found) {  // the emulation alone saw it, too
    error = found.what();
  }
  const bool right = (reports > before) == some && (some || error.empty());
  failed += !right;
  std::printf("%s  %s: %d reports%s%s\n", right ? "ok    " : "FAILED", what, reports - before,
              error.empty() ? "" : "; ", error.c_str());
}

template <typename Kernel, typename... Arguments>
void expect_reports(bool some, const char* what, Kernel kernel, Arguments... arguments) {
  expect_reports_of(kThreads, some, what, kernel, arguments...);
}

void test_hopper(float* out) {
  expect_reports(false, "values handed over at an mbarrier", hand_over_at_mbarrier<Bug::none>, out);
  expect_reports(true, "values not waited for at an mbarrier", hand_over_at_mbarrier<Bug::planted>, out);
  expect_reports(false, "values handed over at a named barrier", hand_over_at_named_barrier<Bug::none>, out);
  expect_reports(true, "values not waited for at a named barrier", hand_over_at_named_barrier<Bug::planted>, out);

  std::vector<float> tensor(4 * kThreads, 1.0f);
  ptx::TensorMap map;
  ptx::encode_tensor_map(map, 4, tensor.data(), {4, kThreads, 1, 1}, {16, 0, 0}, {4, kThreads, 1, 1},
                         ptx::Swizzle::none);
  expect_reports(false, "a tile that was waited for", read_tile<Bug::none>, map, out);
  expect_reports(true, "a tile read after waiting for another one", read_tile<Bug::planted>, map, out);
  expect_reports(false, "a tile loaded again after a barrier", load_tile_again<Bug::none>, map, out);
  expect_reports(true, "a tile loaded again without a barrier", load_tile_again<Bug::planted>, map, out);

  expect_reports_of(kWithWriter, false, "factors between barriers", write_factors<ProductBug::none>, out);
  expect_reports_of(kWithWriter, true, "factors released before their product is complete",
                    write_factors<ProductBug::released_too_early>, out);
  expect_reports_of(kWithWriter, true, "factors that are not waited for",
                    write_factors<ProductBug::factors_not_awaited>, out);
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
  test_hopper(out.data());
  return failed == 0 ? 0 : 1;
}
