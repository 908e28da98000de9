// Hopper's instructions against plain loops: part of test_ptx.cpp. On a GPU of another kind they are left out.
#pragma once
#include <initializer_list>
#include <random>
#include <vector>

#include "../../csrc/ptx/bulk_copy.cuh"
#include "../../csrc/ptx/warpgroup.cuh"
#include "ptx_test.h"

namespace {

using ptx::SharedAddress;
using ptx::Swizzle;

constexpr Swizzle kSwizzles[] = {Swizzle::none, Swizzle::bytes32, Swizzle::bytes64, Swizzle::bytes128};

// ---- Barriers

constexpr int kHandedOver = 7;  // more than a barrier has parities

// The first warp writes a number a round, which the second reads: through mbarriers, and through named barriers.
__global__ void hand_over_kernel(int* through_mbarriers, int* through_named_barriers) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress full = ptx::shared_address(shared), empty = full + 8;
  int* const slots = reinterpret_cast<int*>(shared + 16);
  const int lane = static_cast<int>(threadIdx.x) % ptx::kWarpSize;
  const bool writes = threadIdx.x < ptx::kWarpSize;
  if (threadIdx.x == 0) {
    ptx::barrier_init(full, ptx::kWarpSize);
    ptx::barrier_init(empty, ptx::kWarpSize);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (int round = 0; round < kHandedOver; ++round) {
    const unsigned parity = round % 2;
    if (writes) {
      ptx::barrier_wait(empty, parity ^ 1);
      slots[lane] = round * 100 + lane;
      ptx::barrier_arrive(full);
    } else {
      ptx::barrier_wait(full, parity);
      through_mbarriers[round * ptx::kWarpSize + lane] = slots[ptx::kWarpSize - 1 - lane];
      ptx::barrier_arrive(empty);
    }
  }
  __syncthreads();
  constexpr int kFull = 1, kEmpty = 2, kThreads = 2 * ptx::kWarpSize;
  for (int round = 0; round < kHandedOver; ++round) {
    if (writes) {
      if (round > 0) ptx::named_barrier_sync(kEmpty, kThreads);
      slots[lane] = round * 100 + lane;
      ptx::named_barrier_arrive(kFull, kThreads);
    } else {
      ptx::named_barrier_sync(kFull, kThreads);
      through_named_barriers[round * ptx::kWarpSize + lane] = slots[ptx::kWarpSize - 1 - lane];
      if (round + 1 < kHandedOver) ptx::named_barrier_arrive(kEmpty, kThreads);
    }
  }
}

void test_barriers() {
  Shared<int> first(kHandedOver * ptx::kWarpSize), second(kHandedOver * ptx::kWarpSize);
  run(hand_over_kernel, 2 * ptx::kWarpSize, 16 + ptx::kWarpSize * sizeof(int), first.data(), second.data());
  int wrong_first = 0, wrong_second = 0;
  for (int i = 0; i < kHandedOver * ptx::kWarpSize; ++i) {
    const int right = i / ptx::kWarpSize * 100 + ptx::kWarpSize - 1 - i % ptx::kWarpSize;
    wrong_first += first[i] != right;
    wrong_second += second[i] != right;
  }
  expect(wrong_first == 0, "mbarriers hand over");
  expect(wrong_second == 0, "named barriers hand over");
}

// ---- Copies of tiles

// A tensor of 16-bit elements with gaps between its rows, and the box that is copied.
constexpr int64_t kSizes[4] = {72, 5, 3, 2};
constexpr int64_t kStrides[3] = {160, 992, 3200};  // bytes
constexpr int kTensorBytes = 6400, kTilePlace = 128;
constexpr int kBoxRows[3] = {4, 3, 2};  // of dimensions 1 to 3
constexpr int kRowsOfBox = kBoxRows[0] * kBoxRows[1] * kBoxRows[2];

struct Corner {
  int of[4];
};
constexpr Corner kCorners[] = {{{0, 0, 0, 0}}, {{8, 1, 0, 0}}, {{-3, -2, -1, -1}}, {{67, 3, 2, 1}}, {{80, 0, 0, 0}}};

__global__ void load_tile_kernel(const __grid_constant__ ptx::TensorMap map, Corner first, int bytes,
                                 unsigned char* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress barrier = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::barrier_arrive_expect(barrier, bytes);
    ptx::load_tile(barrier + kTilePlace, map, barrier, first.of[0], first.of[1], first.of[2], first.of[3]);
  }
  ptx::barrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x))
    out[i] = shared[kTilePlace + i];
}

__global__ void store_tile_kernel(const __grid_constant__ ptx::TensorMap map, Corner first, int bytes,
                                  const unsigned char* from) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += static_cast<int>(blockDim.x))
    shared[kTilePlace + i] = from[i];
  ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::store_tile(map, ptx::shared_address(shared) + kTilePlace, first.of[0], first.of[1], first.of[2], first.of[3]);
    ptx::commit_stores();
    ptx::wait_for_stores_read<0>();
  }
}

// Calls visit(place in the tile as it is swizzled, place in the tensor or -1 outside of it), both in bytes.
template <typename Visit>
void for_each_element(Corner first, int box_columns, Swizzle swizzle, const Visit& visit) {
  for (int row = 0; row < kRowsOfBox; ++row)
    for (int column = 0; column < box_columns; ++column) {
      const int at[4] = {first.of[0] + column, first.of[1] + row % kBoxRows[0],
                         first.of[2] + row / kBoxRows[0] % kBoxRows[1], first.of[3] + row / kBoxRows[0] / kBoxRows[1]};
      bool exists = true;
      for (int i = 0; i < 4; ++i) exists = exists && at[i] >= 0 && at[i] < kSizes[i];
      const int64_t place = at[0] * 2 + at[1] * kStrides[0] + at[2] * kStrides[1] + at[3] * kStrides[2];
      // The tile does not start where the pattern does: it is the address that is swizzled.
      const int offset = (row * box_columns + column) * 2;
      visit(ptx::swizzled(swizzle, kTilePlace + offset) - kTilePlace, exists ? static_cast<int>(place) : -1);
    }
}

void test_tiles() {
  Shared<unsigned char> tensor(kTensorBytes);
  std::vector<unsigned char> before(kTensorBytes);
  for (int i = 0; i < kTensorBytes; ++i) before[i] = static_cast<unsigned char>(i * 7 + i / 256 * 3 + 1);
  for (const Swizzle swizzle : kSwizzles) {
    const int box_columns = swizzle == Swizzle::none ? 24 : ptx::row_bytes(swizzle) / 2;
    const int bytes = kRowsOfBox * box_columns * 2;
    ptx::TensorMap map;
    const int error = ptx::encode_tensor_map(map, 2, tensor.data(), kSizes, kStrides,
                                             {box_columns, kBoxRows[0], kBoxRows[1], kBoxRows[2]}, swizzle);
    expect(error == 0, "a tensor map");
    for (const Corner first : kCorners) {
      for (int i = 0; i < kTensorBytes; ++i) tensor[i] = before[i];
      Shared<unsigned char> tile(bytes);
      run(load_tile_kernel, 64, kTilePlace + bytes, map, first, bytes, tile.data());
      int wrong = 0;
      for_each_element(first, box_columns, swizzle, [&](int in_tile, int in_tensor) {
        for (int byte = 0; byte < 2; ++byte)
          wrong += tile[in_tile + byte] != (in_tensor < 0 ? 0 : before[in_tensor + byte]);
      });
      expect(wrong == 0, "load_tile");

      for (int i = 0; i < bytes; ++i) tile[i] = static_cast<unsigned char>(i * 5 + 2);
      run(store_tile_kernel, 64, kTilePlace + bytes, map, first, bytes, static_cast<const unsigned char*>(tile.data()));
      std::vector<unsigned char> after = before;
      for_each_element(first, box_columns, swizzle, [&](int in_tile, int in_tensor) {
        for (int byte = 0; byte < 2 && in_tensor >= 0; ++byte) after[in_tensor + byte] = tile[in_tile + byte];
      });
      wrong = 0;
      for (int i = 0; i < kTensorBytes; ++i) wrong += tensor[i] != after[i];
      expect(wrong == 0, "store_tile");
    }
  }
}

void test_tensor_maps() {
  Shared<unsigned char> tensor(kTensorBytes);
  ptx::TensorMap map;
  const auto error = [&](int element_bytes, const void* data, int64_t size, int64_t stride, int32_t columns,
                         int32_t rows, Swizzle swizzle) {
    return ptx::encode_tensor_map(map, element_bytes, data, {64, size, 1, 1}, {stride, 0, 0}, {columns, rows, 1, 1},
                                  swizzle);
  };
  const unsigned char* data = tensor.data();
  expect(error(2, data, 5, 160, 64, 4, Swizzle::bytes128) == 0, "a tensor map of two dimensions");
  expect(error(2, data + 8, 5, 160, 64, 4, Swizzle::bytes128) != 0, "data that is not aligned to 16 bytes");
  expect(error(2, nullptr, 5, 160, 64, 4, Swizzle::bytes128) != 0, "no data");
  expect(error(2, data, 5, 168, 64, 4, Swizzle::bytes128) != 0, "a stride that is no multiple of 16 bytes");
  expect(error(2, data, 5, 0, 64, 4, Swizzle::bytes128) != 0, "a stride of 0");
  expect(error(2, data, 5, int64_t{1} << 40, 64, 4, Swizzle::bytes128) != 0, "a stride of 2^40");
  expect(error(2, data, 0, 160, 64, 4, Swizzle::bytes128) != 0, "a size of 0");
  expect(error(2, data, 5, 160, 4, 4, Swizzle::none) != 0, "rows of a box that are no multiple of 16 bytes");
  expect(error(2, data, 5, 160, 128, 4, Swizzle::bytes128) != 0, "rows of a box that are wider than their swizzle");
  expect(error(2, data, 5, 160, 64, 257, Swizzle::bytes128) != 0, "a box of too many rows");
  expect(error(8, data, 5, 160, 16, 4, Swizzle::bytes128) != 0, "elements of 8 bytes");
}

// ---- Products of warpgroups

constexpr int kWarpgroup = 128, kSumRows = 64, kStep = 16, kSteps = 4, kFactorDepth = kSteps * kStep;

// A factor in shared memory: element (outer, k), outer being m or n, of 16 bits. Rows of the swizzle's width in blocks
// of all rows; a row is one `outer` or, transposed, one k.
struct FactorLayout {
  int extent;  // of outer
  bool transposed;
  Swizzle swizzle;

  __host__ __device__ int row() const { return ptx::row_bytes(swizzle); }
  __host__ __device__ int block() const { return (transposed ? kFactorDepth : extent) * row(); }
  __host__ __device__ int bytes() const {
    return ((transposed ? extent : kFactorDepth) * 2 + row() - 1) / row() * block();
  }
  __host__ __device__ int place(int outer, int k) const {
    const int line = transposed ? k : outer, along = (transposed ? outer : k) * 2;
    return ptx::swizzled(swizzle, along / row() * block() + line * row() + along % row());
  }
  __device__ ptx::MatrixDescriptor at(SharedAddress start, int step) const {
    const int eight_rows = 8 * row(), k = step * kStep;
    const int from_start = transposed ? k * row() : k * 2 / row() * block() + k * 2 % row();
    const bool exchanged = transposed && swizzle == Swizzle::none;
    return ptx::matrix_descriptor(start + from_start, exchanged ? eight_rows : block(),
                                  exchanged ? block() : eight_rows, swizzle);
  }
};

// Row and column of what a thread of the warpgroup has in its register i.
__host__ __device__ inline int sum_row(int thread, int i) {
  return thread / ptx::kWarpSize * 16 + thread % ptx::kWarpSize / 4 + i / 2 % 2 * 8;
}
__host__ __device__ inline int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

template <typename T>
__device__ void fill_factor(unsigned char* to, const float* from, const FactorLayout& layout) {
  for (int i = static_cast<int>(threadIdx.x); i < layout.extent * kFactorDepth; i += kWarpgroup)
    *reinterpret_cast<T*>(to + layout.place(i / kFactorDepth, i % kFactorDepth)) = ptx::from_float<T>(from[i]);
}

// sum [64, N] += a b for a [64, k] and b [N, k] in device memory; without `accumulate` the sums before do not matter.
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB, bool kRegisters>
__global__ void __launch_bounds__(kWarpgroup, 1)
    warpgroup_kernel(Swizzle swizzle, bool accumulate, const float* a, const float* b, float* sum) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const FactorLayout left{kSumRows, kTransposeA, swizzle}, right{kColumns, kTransposeB, swizzle};
  unsigned char* const b_place = shared + (left.bytes() + 1023) / 1024 * 1024;
  fill_factor<T>(shared, a, left);
  fill_factor<T>(b_place, b, right);
  ptx::fence_async_proxy();
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  float sums[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] = sum[sum_row(thread, i) * kColumns + sum_column(thread, i)];
  unsigned registers[kSteps][4];
  if constexpr (kRegisters) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = a + sum_row(thread, i * 2) * kFactorDepth + step * kStep + i / 2 * 8 + thread % 4 * 2;
        registers[step][i] = ptx::pack_pair<T>(pair[0], pair[1]);
      }
  }
  ptx::warpgroup_arrive(sums);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const ptx::MatrixDescriptor b_step = right.at(ptx::shared_address(b_place), step);
    const bool adds = accumulate || step > 0;
    if constexpr (kRegisters)
      ptx::multiply_add_registers<T, kColumns, kTransposeB>(sums, registers[step], b_step, adds);
    else
      ptx::multiply_add_shared<T, kColumns, kTransposeA, kTransposeB>(sums, left.at(ptx::shared_address(shared), step),
                                                                      b_step, adds);
  }
  ptx::warpgroup_commit();
  ptx::warpgroup_wait<0>(sums);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sum[sum_row(thread, i) * kColumns + sum_column(thread, i)] = sums[i];
}

// Small integers: every product and sum is exact, in whatever order they are added.
void fill_with_integers(std::initializer_list<Shared<float>*> matrices) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> integers(-8, 8);
  for (Shared<float>* matrix : matrices)
    for (size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = static_cast<float>(integers(random));
}

template <typename T, int kColumns, bool kTransposeA, bool kTransposeB, bool kRegisters>
void test_product() {
  Shared<float> a(kSumRows * kFactorDepth), b(kColumns * kFactorDepth), sum(kSumRows * kColumns);
  for (const Swizzle swizzle : kSwizzles)
    for (const bool accumulate : {false, true}) {
      fill_with_integers({&a, &b, &sum});
      std::vector<float> exact(sum.data(), sum.data() + sum.size());
      for (int row = 0; row < kSumRows; ++row)
        for (int column = 0; column < kColumns; ++column) {
          float& total = exact[row * kColumns + column];
          if (!accumulate) total = 0;
          for (int k = 0; k < kFactorDepth; ++k) total += a[row * kFactorDepth + k] * b[column * kFactorDepth + k];
        }
      const int left_bytes = FactorLayout{kSumRows, kTransposeA, swizzle}.bytes();
      const int right_bytes = FactorLayout{kColumns, kTransposeB, swizzle}.bytes();
      run(warpgroup_kernel<T, kColumns, kTransposeA, kTransposeB, kRegisters>, kWarpgroup,
          static_cast<size_t>((left_bytes + 1023) / 1024 * 1024 + right_bytes), swizzle, accumulate,
          static_cast<const float*>(a.data()), static_cast<const float*>(b.data()), sum.data());
      int wrong = 0;
      for (size_t i = 0; i < exact.size(); ++i) wrong += sum[i] != exact[i];
      expect(wrong == 0, kRegisters ? "multiply_add_registers" : "multiply_add_shared");
      if (wrong != 0)
        std::printf("        N %d, transposed %d %d, swizzle %d, accumulate %d: %d wrong\n", kColumns, kTransposeA,
                    kTransposeB, static_cast<int>(swizzle), accumulate, wrong);
    }
}

template <int... kColumns>
void test_products() {
  (test_product<bfloat16, kColumns, false, false, false>(), ...);
  (test_product<bfloat16, kColumns, false, true, false>(), ...);
  (test_product<bfloat16, kColumns, false, kColumns % 64 == 0, true>(), ...);
  test_product<bfloat16, 64, true, false, false>();
  test_product<bfloat16, 64, true, true, false>();
  test_product<bfloat16, 64, false, false, true>();
  test_product<float16, 64, false, false, false>();
  test_product<float16, 128, true, true, false>();
  test_product<float16, 96, false, true, true>();
}

// ---- All together: a warpgroup loads, another one multiplies

constexpr int kPipelineColumns = 128, kPipelineTiles = 5, kStages = 2;
constexpr int kPipelineDepth = kPipelineTiles * kFactorDepth;
constexpr int kLeftBytes = kSumRows * kFactorDepth * 2, kRightBytes = kPipelineColumns * kFactorDepth * 2;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
constexpr int kBarrierPlace = kStages * kStageBytes;

// sum = a b for a [64, k] and b [k, 128] (so transposed, as the values of attention are), by tiles of 64 of k.
__global__ void __launch_bounds__(2 * kWarpgroup, 1)
    pipeline_kernel(const __grid_constant__ ptx::TensorMap a, const __grid_constant__ ptx::TensorMap b, float* sum) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const SharedAddress start = ptx::shared_address(shared), barriers = start + kBarrierPlace;
  const auto full = [&](int stage) { return barriers + stage * 8; };
  const auto empty = [&](int stage) { return barriers + (kStages + stage) * 8; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kWarpgroup);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::release_registers<40>();
    if (threadIdx.x == 0)
      for (int tile = 0; tile < kPipelineTiles; ++tile) {
        const int stage = tile % kStages;
        const SharedAddress left = start + stage * kStageBytes, right = left + kLeftBytes;
        ptx::barrier_wait(empty(stage), tile / kStages % 2 ^ 1);
        ptx::barrier_arrive_expect(full(stage), kStageBytes);
        ptx::load_tile(left, a, full(stage), tile * kFactorDepth, 0, 0, 0);
        for (int half = 0; half < 2; ++half)
          ptx::load_tile(right + half * kRightBytes / 2, b, full(stage), half * 64, tile * kFactorDepth, 0, 0);
      }
  } else {
    ptx::take_registers<232>();
    float sums[kPipelineColumns / 2];
    for (int tile = 0; tile < kPipelineTiles; ++tile) {
      const int stage = tile % kStages;
      const SharedAddress place = start + stage * kStageBytes;
      const ptx::MatrixDescriptor left = ptx::matrix_descriptor(place, 0, 1024, Swizzle::bytes128);
      const ptx::MatrixDescriptor right =
          ptx::matrix_descriptor(place + kLeftBytes, kRightBytes / 2, 1024, Swizzle::bytes128);
      ptx::barrier_wait(full(stage), tile / kStages % 2);
      ptx::warpgroup_arrive(sums);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        ptx::multiply_add_shared<bfloat16, kPipelineColumns, false, true>(
            sums, left.advanced(step * kStep * 2), right.advanced(step * kStep * 128), tile > 0 || step > 0);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(sums);
      ptx::barrier_arrive(empty(stage));
    }
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
#pragma unroll
    for (int i = 0; i < kPipelineColumns / 2; ++i)
      sum[sum_row(thread, i) * kPipelineColumns + sum_column(thread, i)] = sums[i];
  }
}

void test_pipeline() {
  Shared<float> a(kSumRows * kPipelineDepth), b(kPipelineDepth * kPipelineColumns), sum(kSumRows * kPipelineColumns);
  Shared<bfloat16> narrow_a(a.size()), narrow_b(b.size());
  fill_with_integers({&a, &b});
  for (size_t i = 0; i < a.size(); ++i) narrow_a[i] = __float2bfloat16(a[i]);
  for (size_t i = 0; i < b.size(); ++i) narrow_b[i] = __float2bfloat16(b[i]);
  ptx::TensorMap map_a, map_b;
  bool encoded = ptx::encode_tensor_map(map_a, 2, narrow_a.data(), {kPipelineDepth, kSumRows, 1, 1},
                                        {kPipelineDepth * 2, 0, 0}, {64, kSumRows, 1, 1}, Swizzle::bytes128) == 0;
  encoded =
      encoded && ptx::encode_tensor_map(map_b, 2, narrow_b.data(), {kPipelineColumns, kPipelineDepth, 1, 1},
                                        {kPipelineColumns * 2, 0, 0}, {64, kFactorDepth, 1, 1}, Swizzle::bytes128) == 0;
  expect(encoded, "tensor maps of a product");
  run(pipeline_kernel, 2 * kWarpgroup, kBarrierPlace + 2 * kStages * 8, map_a, map_b, sum.data());
  int wrong = 0;
  for (int row = 0; row < kSumRows; ++row)
    for (int column = 0; column < kPipelineColumns; ++column) {
      float exact = 0;
      for (int k = 0; k < kPipelineDepth; ++k) exact += a[row * kPipelineDepth + k] * b[k * kPipelineColumns + column];
      wrong += sum[row * kPipelineColumns + column] != exact;
    }
  expect(wrong == 0, "tiles that one warpgroup loads and another one multiplies");
}

void test_hopper() {
#ifdef __CUDACC__
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess || device.major != 9) {
    std::printf("Hopper's instructions are left out: this GPU has others\n");
    return;
  }
#endif
  test_barriers();
  test_tensor_maps();
  test_tiles();
  test_products<32, 64, 96, 128, 192, 256>();
  test_pipeline();
}

}  // namespace
