// Bugs planted around Hopper's asynchronous instructions, each of which the emulation finds: part of
// test_emulation.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ptx/bulk_copy.cuh"
#include "../../csrc/ptx/warpgroup.cuh"

namespace hopper {

using namespace selfforcing;
using ptx::SharedAddress;
using ptx::Swizzle;

constexpr int kThreads = 128;

// What every kernel here does right, or wrong in one place.
enum class Bug {
  none,
  // barriers
  not_initialised,
  not_aligned,
  overwritten,
  too_many_arrivals,
  too_few_arrivals,
  no_parity,
  // copies
  not_shown,
  too_many_bytes,
  too_few_bytes,
  no_wait,
  tile_not_aligned,
  tile_outside,
  no_fence,
  written_too_early,
  waits_for_older,
  not_committed,
  // products
  no_arrive,
  no_arrive_again,
  sums_touched,
  half_the_threads,
  two_places,
  two_descriptors,
  start_not_aligned,
  start_inside_pattern,
  start_inside_row,
  factor_outside,
};

constexpr int kSharedBytes = 8192, kBarrier = 4096;

// ---- Barriers

template <Bug kBug>
__global__ void meet_at_mbarrier() {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress barrier = ptx::shared_address(shared) + (kBug == Bug::not_aligned ? 4 : 0);
  if (threadIdx.x == 0 && kBug != Bug::not_initialised) ptx::barrier_init(barrier, kThreads);
  __syncthreads();
  if (kBug == Bug::overwritten && threadIdx.x == 0) shared[3] = 0;
  if (kBug == Bug::too_many_arrivals && threadIdx.x == 0) ptx::barrier_arrive_expect(barrier, 16);
  if (kBug != Bug::too_few_arrivals || threadIdx.x != 5) ptx::barrier_arrive(barrier);
  ptx::barrier_wait(barrier, kBug == Bug::no_parity ? 2 : 0);
}

template <Bug kBug>
__global__ void meet_at_named_barrier() {
  const bool absent = kBug == Bug::half_the_threads && threadIdx.x < kThreads / 2;
  if (!absent) ptx::named_barrier_sync(1, kBug == Bug::two_places && threadIdx.x == 0 ? 64 : kThreads);
  if (kBug == Bug::too_many_arrivals) {
    ptx::named_barrier_arrive(2, kThreads);
    ptx::named_barrier_arrive(2, kThreads);
  }
}

// ---- Copies

// Loads 16 rows of 64 bytes, and reads them.
template <Bug kBug>
__global__ void load(const __grid_constant__ ptx::TensorMap map, float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  constexpr int kBytes = 16 * 64;
  const SharedAddress barrier = ptx::shared_address(shared) + kBarrier;
  const int place = kBug == Bug::tile_not_aligned ? 64 : kBug == Bug::tile_outside ? kSharedBytes - 512 : 0;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    if (kBug != Bug::not_shown) ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int wrong = kBug == Bug::too_many_bytes ? 16 : kBug == Bug::too_few_bytes ? -16 : 0;
    ptx::barrier_arrive_expect(barrier, kBytes + wrong);
    ptx::load_tile(ptx::shared_address(shared) + place, map, barrier, 0, 0, 0, 0);
  }
  if (kBug != Bug::no_wait) ptx::barrier_wait(barrier, 0);
  out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
  if (kBug == Bug::no_wait) ptx::barrier_wait(barrier, 0);
}

__global__ void end_before_load(const __grid_constant__ ptx::TensorMap map) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress barrier = ptx::shared_address(shared) + kBarrier;
  if (threadIdx.x != 0) return;
  ptx::barrier_init(barrier, 1);
  ptx::fence_barrier_init();
  ptx::load_tile(ptx::shared_address(shared), map, barrier, 0, 0, 0, 0);
}

// A tile that is read a second time while the next one is loaded to its place.
__global__ void load_over_tile_in_use(const __grid_constant__ ptx::TensorMap map, float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress barrier = ptx::shared_address(shared) + kBarrier;
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      ptx::barrier_arrive_expect(barrier, 16 * 64);
      ptx::load_tile(ptx::shared_address(shared), map, barrier, 0, 0, 0, 0);
    }
    if (round == 0) ptx::barrier_wait(barrier, 0);
  }
  out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
  ptx::barrier_wait(barrier, 1);
}

template <Bug kBug>
__global__ void store(const __grid_constant__ ptx::TensorMap map) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  for (int i = 0; i < 2; ++i) reinterpret_cast<float*>(shared)[threadIdx.x * 2 + i] = 3;
  if (kBug != Bug::no_fence) ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x != 0) return;
  ptx::store_tile(map, ptx::shared_address(shared), 0, 0, 0, 0);
  if (kBug != Bug::not_committed) ptx::commit_stores();
  if (kBug == Bug::written_too_early) shared[0] = 1;
  if (kBug != Bug::no_wait) ptx::wait_for_stores_read<kBug == Bug::waits_for_older ? 1 : 0>();
}

// ---- Products

// Ones times ones: every sum is 16.
template <Bug kBug>
__global__ void multiply(float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  constexpr int kColumns = 32, kLeftBytes = 64 * 32, kRightBytes = kColumns * 32;
  for (int i = static_cast<int>(threadIdx.x); i < (kLeftBytes + kRightBytes) / 2; i += kThreads)
    reinterpret_cast<ptx::bfloat16*>(shared)[i] = ptx::from_float<ptx::bfloat16>(1);
  if (kBug != Bug::no_fence) ptx::fence_async_proxy();
  __syncthreads();
  if (kBug == Bug::half_the_threads && threadIdx.x % 2 != 0) return;
  const SharedAddress start = ptx::shared_address(shared);
  const int from_start = kBug == Bug::start_not_aligned      ? 8
                         : kBug == Bug::start_inside_pattern ? 32
                         : kBug == Bug::start_inside_row     ? 16
                         : kBug == Bug::factor_outside       ? kSharedBytes - 256
                                                             : 0;
  const ptx::MatrixDescriptor left = ptx::matrix_descriptor(start + from_start, 0, 256, Swizzle::bytes32);
  const int other = kBug == Bug::two_descriptors && threadIdx.x == 77 ? 512 : 0;
  const ptx::MatrixDescriptor right = ptx::matrix_descriptor(start + kLeftBytes - other, 0, 256, Swizzle::bytes32);
  float sums[kColumns / 2];
  if (kBug != Bug::no_arrive) ptx::warpgroup_arrive(sums);
  if (kBug == Bug::two_places && threadIdx.x < 32)
    ptx::multiply_add_shared<ptx::bfloat16, kColumns, false, false>(sums, left, right, false);
  else
    ptx::multiply_add_shared<ptx::bfloat16, kColumns, false, false>(sums, left, right, false);
  if (kBug != Bug::not_committed) ptx::warpgroup_commit();
  if constexpr (kBug == Bug::waits_for_older) {
    ptx::multiply_add_shared<ptx::bfloat16, kColumns, false, false>(sums, left, right, true);
    ptx::warpgroup_commit();
  }
  if (kBug == Bug::sums_touched) sums[3] *= 2, sums[4] = 1;
  if (kBug == Bug::written_too_early) shared[threadIdx.x] = 0;
  if (kBug != Bug::no_wait) ptx::warpgroup_wait<kBug == Bug::waits_for_older ? 1 : 0>(sums);
  if constexpr (kBug == Bug::no_arrive_again)
    ptx::multiply_add_shared<ptx::bfloat16, kColumns, false, false>(sums, left, right, true);
  out[threadIdx.x] = sums[threadIdx.x % 16];
}

// Of two groups the newer one is still under way.
template <bool kWaitForBoth>
__global__ void multiply_twice(float* first, float* second) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  for (int i = static_cast<int>(threadIdx.x); i < 96 * 16; i += kThreads)
    reinterpret_cast<ptx::bfloat16*>(shared)[i] = ptx::from_float<ptx::bfloat16>(1);
  ptx::fence_async_proxy();
  __syncthreads();
  const SharedAddress start = ptx::shared_address(shared);
  const ptx::MatrixDescriptor left = ptx::matrix_descriptor(start, 0, 256, Swizzle::bytes32);
  const ptx::MatrixDescriptor right = ptx::matrix_descriptor(start + 64 * 32, 0, 256, Swizzle::bytes32);
  float a[16], b[16];
  ptx::warpgroup_arrive(a, b);
  ptx::multiply_add_shared<ptx::bfloat16, 32, false, false>(a, left, right, false);
  ptx::warpgroup_commit();
  ptx::multiply_add_shared<ptx::bfloat16, 32, false, false>(b, left, right, false);
  ptx::warpgroup_commit();
  ptx::warpgroup_wait<kWaitForBoth ? 0 : 1>(a);
  first[threadIdx.x] = a[0];
  second[threadIdx.x] = b[0];
  ptx::warpgroup_wait<0>(b);
}

template <typename Kernel, typename... Arguments>
std::string error_of(Kernel kernel, int threads, Arguments... arguments) {
  try {
    ptx::launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), kSharedBytes, nullptr, arguments...);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

bool any_nan(const std::vector<float>& values) {
  return std::any_of(values.begin(), values.end(), [](float x) { return std::isnan(x); });
}

// check(error, what it says or nothing, which bug)
template <typename Check>
void test_barriers(const Check& check) {
  check(error_of(meet_at_mbarrier<Bug::none>, kThreads), "", "threads that meet at an mbarrier");
  check(error_of(meet_at_mbarrier<Bug::not_initialised>, kThreads), "not initialised", "an mbarrier without init");
  check(error_of(meet_at_mbarrier<Bug::not_aligned>, kThreads), "aligned to 8", "an mbarrier off its place");
  check(error_of(meet_at_mbarrier<Bug::overwritten>, kThreads), "overwritten", "an mbarrier that is written over");
  check(error_of(meet_at_mbarrier<Bug::too_many_arrivals>, kThreads), "more threads",
        "a thread arrives twice at an mbarrier");
  check(error_of(meet_at_mbarrier<Bug::too_few_arrivals>, kThreads), "misses 1 arrivals", "a thread does not arrive");
  check(error_of(meet_at_mbarrier<Bug::no_parity>, kThreads), "neither 0 nor 1", "a wait for phase 2");
  check(error_of(meet_at_named_barrier<Bug::none>, kThreads), "", "threads that meet at a named barrier");
  check(error_of(meet_at_named_barrier<Bug::half_the_threads>, kThreads), "deadlock", "too few at a named barrier");
  check(error_of(meet_at_named_barrier<Bug::two_places>, kThreads), "another number", "two sizes of a named barrier");
  check(error_of(meet_at_named_barrier<Bug::too_many_arrivals>, kThreads), "again before", "a thread arrives twice");
}

template <typename Check>
void test_copies(const Check& check) {
  std::vector<float> tensor(256, 5.0f), out(kThreads);
  ptx::TensorMap map;
  ptx::encode_tensor_map(map, 4, tensor.data(), {16, 16, 1, 1}, {64, 0, 0}, {16, 16, 1, 1}, Swizzle::none);
  check(error_of(load<Bug::none>, kThreads, map, out.data()), "", "a tile that is waited for");
  for (float value : out) check(value == 5 ? "" : "wrong", "", "values of a tile");
  check(error_of(load<Bug::none>, kThreads, ptx::TensorMap{}, out.data()), "not encoded", "an empty tensor map");
  check(error_of(load<Bug::not_shown>, kThreads, map, out.data()), "fence_barrier_init", "a barrier not shown");
  check(error_of(load<Bug::too_many_bytes>, kThreads, map, out.data()), "0 arrivals and 16 bytes", "too many bytes");
  check(error_of(load<Bug::too_few_bytes>, kThreads, map, out.data()), "0 arrivals and -16 bytes", "too few bytes");
  check(error_of(load<Bug::tile_not_aligned>, kThreads, map, out.data()), "128 bytes", "a tile off its place");
  check(error_of(load<Bug::tile_outside>, kThreads, map, out.data()), "not inside", "a tile outside");
  out.assign(kThreads, 0);
  check(error_of(load<Bug::no_wait>, kThreads, map, out.data()), "", "a tile read too early is no deadlock");
  check(any_nan(out) ? "" : "wrong", "", "a tile read too early is NaN");
  out.assign(kThreads, 0);
  check(error_of(load_over_tile_in_use, kThreads, map, out.data()), "", "a tile overwritten in use is no deadlock");
  check(any_nan(out) ? "" : "wrong", "", "a tile overwritten in use is NaN");
  check(error_of(end_before_load, kThreads, map), "ends before this copy", "a block that ends before its copy");

  check(error_of(store<Bug::none>, kThreads, map), "", "a tile that is stored");
  for (float value : tensor) check(value == 3 ? "" : "wrong", "", "values of a tile that was stored");
  check(error_of(store<Bug::no_fence>, kThreads, map), "fence_async_proxy", "a store without a fence");
  check(error_of(store<Bug::written_too_early>, kThreads, map), "before this store",
        "a tile written before it is read");
  check(error_of(store<Bug::not_committed>, kThreads, map), "ends before this store", "a store without a commit");
  check(error_of(store<Bug::waits_for_older>, kThreads, map), "ends before this store", "a wait for an older store");
  check(error_of(store<Bug::no_wait>, kThreads, map), "ends before this store", "a thread that ends before its store");
}

template <typename Check>
void test_products(const Check& check) {
  std::vector<float> out(kThreads), second(kThreads);
  const auto error = [&](auto kernel, int threads = kThreads) { return error_of(kernel, threads, out.data()); };
  check(error(multiply<Bug::none>), "", "a product");
  for (float value : out) check(value == 16 ? "" : "wrong", "", "values of a product");
  check(error(multiply<Bug::none>, 96), "not full", "a warpgroup of three warps");
  check(error(multiply<Bug::no_fence>), "fence_async_proxy", "a product without a fence");
  check(error(multiply<Bug::no_arrive>), "without warpgroup_arrive", "a product without warpgroup_arrive");
  check(error(multiply<Bug::no_arrive_again>), "without warpgroup_arrive", "no warpgroup_arrive after a wait");
  check(error(multiply<Bug::not_committed>), "under way", "a product without a commit");
  out.assign(kThreads, 0);
  check(error(multiply<Bug::waits_for_older>), "under way", "a wait for the older of two products of the same sums");
  check(error(multiply<Bug::no_wait>), "ends before this product", "a product without a wait");
  check(any_nan(out) ? "" : "wrong", "", "sums read too early are NaN");
  check(error(multiply<Bug::sums_touched>), "sums were written", "sums written while in use");
  check(error(multiply<Bug::written_too_early>), "while this product", "a factor written while in use");
  check(error(multiply<Bug::half_the_threads>), "deadlock", "threads that miss a product");
  check(error(multiply<Bug::two_places>), "while others wait", "a product at two places");
  check(error(multiply<Bug::two_descriptors>), "different products", "two descriptors");
  check(error(multiply<Bug::start_not_aligned>), "multiples of 16", "a factor that is not aligned");
  check(error(multiply<Bug::start_inside_pattern>), "first row", "a factor that starts inside of its pattern");
  check(error(multiply<Bug::start_inside_row>), "inside of a row", "a factor that starts inside of a row");
  check(error(multiply<Bug::factor_outside>), "not inside", "a factor outside of shared memory");
  check(error_of(multiply_twice<false>, kThreads, out.data(), second.data()), "", "the older of two products");
  for (float value : out) check(value == 16 ? "" : "wrong", "", "values of the older product");
  for (float value : second) check(std::isnan(value) ? "" : "wrong", "", "the newer product is NaN");
  check(error_of(multiply_twice<true>, kThreads, out.data(), second.data()), "", "both products");
  for (float value : second) check(value == 16 ? "" : "wrong", "", "values of the newer product");
}

}  // namespace hopper
