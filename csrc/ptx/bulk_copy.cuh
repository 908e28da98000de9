// Copies of tiles of a tensor between device memory and shared memory by the tensor memory accelerator (PTX ISA, "Data
// Movement and Conversion Instructions: Tensor copy"; CUDA Driver API, "Tensor Map Object Management"; the wrappers are
// for sm_90a alone).
//
// One thread asks for a tile: a box of a tensor of four dimensions, the first contiguous. In shared memory the box is
// dense, its first dimension innermost, its 16-byte chunks swizzled (swizzle.cuh). What lies outside of the tensor is
// zero in shared memory and not written back.
#pragma once
#include <algorithm>

#include "barrier.cuh"
#include "swizzle.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

namespace selfforcing::ptx {

// What tensor a copy is of: a kernel's parameter `const __grid_constant__ TensorMap map`.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = emulation::TensorMap;
#endif

namespace tensor_map {

constexpr int32_t kInvalidValue = 1;       // cudaErrorInvalidValue
constexpr int32_t kNeedsNewerDriver = 36;  // cudaErrorCallRequiresNewerDriver

constexpr int64_t kStrideUnit = 16, kStrideLimit = int64_t{1} << 40;  // in bytes

// Dimensions 0 to i take so many bytes: a stride for the next one, if it has size 1, that any rule allows.
inline int64_t stride_past(int i, int element_bytes, const int64_t (&sizes)[4], const int64_t (&byte_strides)[3]) {
  const int64_t bytes = sizes[i] * (i == 0 ? element_bytes : byte_strides[i - 1]);
  const int64_t rounded = (bytes + kStrideUnit - 1) / kStrideUnit * kStrideUnit;
  return std::clamp(rounded, kStrideUnit, kStrideLimit - kStrideUnit);
}

// The rules of cuTensorMapEncodeTiled, and one of ours: a swizzled box is as wide as its swizzle.
inline bool valid(int element_bytes, const void* data, const int64_t (&sizes)[4], const int64_t (&byte_strides)[3],
                  const int32_t (&box)[4], Swizzle swizzle) {
  const bool known_element = element_bytes == 1 || element_bytes == 2 || element_bytes == 4;
  if (!known_element || data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  for (int i = 0; i < 4; ++i)
    if (sizes[i] < 1 || sizes[i] > int64_t{1} << 32 || box[i] < 1 || box[i] > 256) return false;
  for (int i = 0; i < 3; ++i)
    if (byte_strides[i] < kStrideUnit || byte_strides[i] >= kStrideLimit || byte_strides[i] % kStrideUnit != 0)
      return false;
  const int inner = box[0] * element_bytes;
  return swizzle == Swizzle::none ? inner % 16 == 0 : inner == row_bytes(swizzle);
}

#ifdef __CUDACC__

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

// The driver's function, which this library is not linked with; nullptr where the driver has none.
inline Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// cuTensorMapEncodeTiled wants a context, which a thread has only once the runtime has bound it: cudaSetDevice does so,
// also while a graph is captured.
inline cudaError_t bind_context() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaSetDevice(device) : error;
}

#endif

}  // namespace tensor_map

// Describes a tensor of elements of 1, 2 or 4 bytes. Returns a cudaError_t: cudaErrorInvalidValue where the driver
// would reject it (`data` and strides are multiples of 16 bytes, strides positive and below 2^40, sizes at least 1, a
// box's edge at most 256, its first a multiple of 16 bytes) or a swizzled box is not as wide as its swizzle, and
// cudaErrorCallRequiresNewerDriver where the driver knows no tensor maps. What else the driver finds is returned as it
// is: the numbers of CUresult are those of cudaError_t. The stride of a dimension of size 1 does not matter.
inline int32_t encode_tensor_map(TensorMap& map, int element_bytes, const void* data, const int64_t (&sizes)[4],
                                 const int64_t (&byte_strides)[3], const int32_t (&box)[4], Swizzle swizzle) {
  int64_t strides[3];
  for (int i = 0; i < 3; ++i)
    strides[i] = sizes[i + 1] == 1 ? tensor_map::stride_past(i, element_bytes, sizes, strides) : byte_strides[i];
  if (!tensor_map::valid(element_bytes, data, sizes, strides, box, swizzle)) return tensor_map::kInvalidValue;
#ifdef __CUDACC__
  static_assert(tensor_map::kInvalidValue == cudaErrorInvalidValue);
  static_assert(tensor_map::kNeedsNewerDriver == cudaErrorCallRequiresNewerDriver);
  static const tensor_map::Encode encode = tensor_map::find_encode();
  if (encode == nullptr) return tensor_map::kNeedsNewerDriver;
  const cudaError_t error = tensor_map::bind_context();
  if (error != cudaSuccess) return static_cast<int32_t>(error);
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_DATA_TYPE_UINT16,
                                            CU_TENSOR_MAP_DATA_TYPE_UINT32};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t driver_sizes[4], driver_strides[3];
  cuuint32_t driver_box[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    driver_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    driver_box[i] = static_cast<cuuint32_t>(box[i]);
  }
  for (int i = 0; i < 3; ++i) driver_strides[i] = static_cast<cuuint64_t>(strides[i]);
  const CUresult result =
      encode(&map, kTypes[element_bytes / 2], 4, const_cast<void*>(data), driver_sizes, driver_strides, driver_box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int32_t>(result);
#else
  map = {static_cast<unsigned char*>(const_cast<void*>(data)), element_bytes, {}, {}, {}, row_bytes(swizzle)};
  for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i], map.box[i] = box[i];
  for (int i = 0; i < 3; ++i) map.strides[i + 1] = strides[i];
  return 0;
#endif
}

#ifdef __CUDACC__

// The box whose first element is (c0, c1, c2, c3), to `target` (aligned to 128 bytes). All bytes of the box, also those
// outside of the tensor, count for the barrier.
__device__ __forceinline__ void load_tile(SharedAddress target, const TensorMap& map, SharedAddress barrier, int c0,
                                          int c1, int c2, int c3) {
  SELFFORCING_HOPPER_ASM(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// The way back. Stores to shared memory that it shall read come before fence_async_proxy and a barrier.
__device__ __forceinline__ void store_tile(const TensorMap& map, SharedAddress source, int c0, int c1, int c2, int c3) {
  SELFFORCING_HOPPER_ASM(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// cp.async.bulk.commit_group: this thread's stores since the last one form a group.
__device__ __forceinline__ void commit_stores() { SELFFORCING_HOPPER_ASM("cp.async.bulk.commit_group;" :: : "memory"); }

// cp.async.bulk.wait_group.read: all but the newest kGroups groups of this thread have read their shared memory. A
// thread waits for all of its stores before it ends.
template <int kGroups>
__device__ __forceinline__ void wait_for_stores_read() {
  SELFFORCING_HOPPER_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

#else

inline void load_tile(SharedAddress target, const TensorMap& map, SharedAddress barrier, int c0, int c1, int c2, int c3,
                      EmulationSite where = EmulationSite::current()) {
  emulation::load_tile(target, map, barrier, {c0, c1, c2, c3}, where);
}
inline void store_tile(const TensorMap& map, SharedAddress source, int c0, int c1, int c2, int c3,
                       EmulationSite where = EmulationSite::current()) {
  emulation::store_tile(map, source, {c0, c1, c2, c3}, where);
}
inline void commit_stores() { emulation::commit_stores(); }
template <int kGroups>
void wait_for_stores_read() {
  emulation::wait_for_stores_read(kGroups);
}

#endif

}  // namespace selfforcing::ptx
