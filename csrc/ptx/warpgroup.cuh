// Products of matrices by a warpgroup: four warps, the first a multiple of four (PTX ISA, "Asynchronous Warpgroup Level
// Matrix Instructions"; sm_90a alone).
//
// sum [64, N] += a [64, 16] b [16, N] with 16-bit factors and float32 sums. Lane l of warp w holds of `sum` the
// elements (16 w + l / 4 + 8 i, 8 n + 2 (l % 4) + j) in register 4 n + 2 i + j. As a factor in registers, `a` is what
// mma.cuh's multiply_add takes, 16 rows for each warp. Factors in shared memory are named by descriptors.
//
// A product runs while the warpgroup goes on. All threads call, with the same descriptors:
//   warpgroup_arrive(sum)     before the first product, and again once registers that products use have been touched;
//   multiply_add_...          any number of products;
//   warpgroup_commit()        they form a group;
//   warpgroup_wait<0>(sum)    then sums may be read, and shared memory that the products read be written.
// Products with the same sums follow each other. Nothing else may touch the sums, or `a` in registers, in between.
#pragma once
#include <type_traits>

#include "barrier.cuh"
#include "mma.cuh"
#include "swizzle.cuh"

namespace selfforcing::ptx {

// A factor in shared memory: where it starts, how its 16-byte chunks follow each other, and their swizzle ("Matrix
// Descriptor Format").
struct MatrixDescriptor {
  uint64_t bits;

  // The same `bytes` later: the next 16 values of k, or another part of m or n.
  __host__ __device__ constexpr MatrixDescriptor advanced(int bytes) const {
    return {bits + static_cast<uint64_t>(bytes >> 4)};
  }
};

// What matrix_descriptor takes. m and n are called the other dimension here. With R = row_bytes(swizzle), elements are
// found as follows, and the result is swizzled as an address.
//
// K-major (not transposed: 16 values of k of one row or column lie together): eight rows of R bytes follow each other,
// the next eight `stride_bytes` later. R >= 32 holds the 16 values of k, `leading_bytes` is not used; without a swizzle
// R is 16, and the second eight values of k are `leading_bytes` after the first.
//
// Transposed (neighbours of the other dimension lie together, a row is one k): eight rows of R bytes follow each other,
// the next eight values of k `stride_bytes` later, the next R bytes of the other dimension `leading_bytes` later.
// Without a swizzle the two exchange their places: `leading_bytes` to the next k, `stride_bytes` in the other
// dimension.
//
// A tile that load_tile has put there, [rows, R bytes] for each box, thus has stride_bytes = 8 R, and leading_bytes is
// from box to box. `start` and both distances are multiples of 16; `start` lies in the first row of the swizzle's
// pattern: advance along k within a K-major row, or by whole patterns.
__host__ __device__ constexpr MatrixDescriptor encode_matrix_descriptor(unsigned address, int leading_bytes,
                                                                        int stride_bytes, Swizzle swizzle) {
  const auto encode = [](unsigned bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  const uint64_t mode = (4 - static_cast<unsigned>(swizzle)) % 4;  // 1: 128 bytes, 2: 64, 3: 32
  return {encode(address) | encode(static_cast<unsigned>(leading_bytes)) << 16 |
          encode(static_cast<unsigned>(stride_bytes)) << 32 | mode << 62};
}

#ifdef __CUDACC__

__device__ __forceinline__ MatrixDescriptor matrix_descriptor(SharedAddress start, int leading_bytes, int stride_bytes,
                                                              Swizzle swizzle) {
  return encode_matrix_descriptor(start, leading_bytes, stride_bytes, swizzle);
}

// The compiler moves no use of these registers across this.
template <int kSize>
__device__ __forceinline__ void hold_registers(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// The same of a left factor: its registers are written here, not behind a later warpgroup_arrive.
template <int kDepths>
__device__ __forceinline__ void hold_factor(unsigned (&factor)[kDepths][4]) {
#pragma unroll
  for (int depth = 0; depth < kDepths; ++depth)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(factor[depth][i])::"memory");
}

// wgmma.fence: registers that this thread has touched, among them `sums`, are ready for products.
template <int... kSizes>
__device__ __forceinline__ void warpgroup_arrive(float (&... sums)[kSizes]) {
  (hold_registers(sums), ...);
  SELFFORCING_HOPPER_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}

// wgmma.commit_group: the products since the last one form a group.
__device__ __forceinline__ void warpgroup_commit() {
  SELFFORCING_HOPPER_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}

// wgmma.wait_group: all but the newest kGroups groups are complete, among them all products of `sums`.
template <int kGroups, int... kSizes>
__device__ __forceinline__ void warpgroup_wait(float (&... sums)[kSizes]) {
  SELFFORCING_HOPPER_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (hold_registers(sums), ...);
}

// setmaxnreg: how many registers each thread of this warpgroup may use from here on, a multiple of 8 from 24 to 256.
// What one warpgroup releases another may take; taking waits until there are enough. For kernels that say in
// __launch_bounds__ how many blocks share a multiprocessor.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  SELFFORCING_HOPPER_ASM("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  SELFFORCING_HOPPER_ASM("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- The instruction, written once for all N: a string names the registers of the sums, %0 and following; what comes
// after them is numbered by the caller, since assembler text cannot count.

// clang-format off
#define SELFFORCING_SUM_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SELFFORCING_SUM_NAMES_32 SELFFORCING_SUM_NAMES_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SELFFORCING_SUM_NAMES_48 SELFFORCING_SUM_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SELFFORCING_SUM_NAMES_64 SELFFORCING_SUM_NAMES_48 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SELFFORCING_SUM_NAMES_96 SELFFORCING_SUM_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SELFFORCING_SUM_NAMES_128 SELFFORCING_SUM_NAMES_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SELFFORCING_SUMS_4(i) "+f"(sum[i]), "+f"(sum[(i) + 1]), "+f"(sum[(i) + 2]), "+f"(sum[(i) + 3])
#define SELFFORCING_SUMS_16(i) \
  SELFFORCING_SUMS_4(i), SELFFORCING_SUMS_4((i) + 4), SELFFORCING_SUMS_4((i) + 8), SELFFORCING_SUMS_4((i) + 12)
#define SELFFORCING_SUMS_32(i) SELFFORCING_SUMS_16(i), SELFFORCING_SUMS_16((i) + 16)
#define SELFFORCING_SUMS_48(i) SELFFORCING_SUMS_32(i), SELFFORCING_SUMS_16((i) + 32)
#define SELFFORCING_SUMS_64(i) SELFFORCING_SUMS_32(i), SELFFORCING_SUMS_32((i) + 32)
#define SELFFORCING_SUMS_96(i) SELFFORCING_SUMS_64(i), SELFFORCING_SUMS_32((i) + 64)
#define SELFFORCING_SUMS_128(i) SELFFORCING_SUMS_64(i), SELFFORCING_SUMS_64((i) + 64)
// clang-format on

#define SELFFORCING_WGMMA_SHARED(n, registers, type, p0, p1, p2, p3, p4)                                     \
  SELFFORCING_HOPPER_ASM(                                                                                    \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " p2                                                             \
      ", 0;\n"                                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" SELFFORCING_SUM_NAMES_##registers \
      "}, " p0 ", " p1 ", add, 1, 1, " p3 ", " p4 ";\n}" : SELFFORCING_SUMS_##registers(0) : "l"(a.bits),    \
      "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(kTransposeA), "n"(kTransposeB))

#define SELFFORCING_WGMMA_REGISTERS(n, registers, type, p0, p1, p2, p3, p4, p5, p6)                          \
  SELFFORCING_HOPPER_ASM(                                                                                    \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " p5                                                             \
      ", 0;\n"                                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" SELFFORCING_SUM_NAMES_##registers \
      "}, {" p0 ", " p1 ", " p2 ", " p3 "}, " p4 ", add, 1, 1, " p6                                          \
      ";\n}" : SELFFORCING_SUMS_##registers(0) : "r"(a[0]),                                                  \
      "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(accumulate)), "n"(kTransposeB))

template <int kColumns>
struct WarpgroupProduct;

#define SELFFORCING_WARPGROUP_PRODUCT(n, registers, p0, p1, p2, p3, p4, p5, p6)                                    \
  template <>                                                                                                      \
  struct WarpgroupProduct<n> {                                                                                     \
    template <typename T, int kTransposeA, int kTransposeB>                                                        \
    __device__ __forceinline__ static void shared(float (&sum)[registers], MatrixDescriptor a, MatrixDescriptor b, \
                                                  bool accumulate) {                                               \
      if constexpr (std::is_same_v<T, bfloat16>)                                                                   \
        SELFFORCING_WGMMA_SHARED(n, registers, "bf16", p0, p1, p2, p3, p4);                                        \
      else                                                                                                         \
        SELFFORCING_WGMMA_SHARED(n, registers, "f16", p0, p1, p2, p3, p4);                                         \
    }                                                                                                              \
    template <typename T, int kTransposeB>                                                                         \
    __device__ __forceinline__ static void in_registers(float (&sum)[registers], const unsigned (&a)[4],           \
                                                        MatrixDescriptor b, bool accumulate) {                     \
      if constexpr (std::is_same_v<T, bfloat16>)                                                                   \
        SELFFORCING_WGMMA_REGISTERS(n, registers, "bf16", p0, p1, p2, p3, p4, p5, p6);                             \
      else                                                                                                         \
        SELFFORCING_WGMMA_REGISTERS(n, registers, "f16", p0, p1, p2, p3, p4, p5, p6);                              \
    }                                                                                                              \
  }

SELFFORCING_WARPGROUP_PRODUCT(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
SELFFORCING_WARPGROUP_PRODUCT(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
SELFFORCING_WARPGROUP_PRODUCT(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54");
SELFFORCING_WARPGROUP_PRODUCT(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
SELFFORCING_WARPGROUP_PRODUCT(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102");
SELFFORCING_WARPGROUP_PRODUCT(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134");

// sum = a b, or sum += a b where `accumulate`; a and b of type T in shared memory. kTransposeA: m lies together, not k;
// kTransposeB: n does.
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
__device__ __forceinline__ void multiply_add_shared(float (&sum)[kColumns / 2], MatrixDescriptor a, MatrixDescriptor b,
                                                    bool accumulate) {
  WarpgroupProduct<kColumns>::template shared<T, kTransposeA, kTransposeB>(sum, a, b, accumulate);
}

// The same with `a` in registers.
template <typename T, int kColumns, bool kTransposeB>
__device__ __forceinline__ void multiply_add_registers(float (&sum)[kColumns / 2], const unsigned (&a)[4],
                                                       MatrixDescriptor b, bool accumulate) {
  WarpgroupProduct<kColumns>::template in_registers<T, kTransposeB>(sum, a, b, accumulate);
}

#else

inline MatrixDescriptor matrix_descriptor(SharedAddress start, int leading_bytes, int stride_bytes, Swizzle swizzle,
                                          EmulationSite where = EmulationSite::current()) {
  return encode_matrix_descriptor(emulation::matrix_start(start, leading_bytes, stride_bytes, where), leading_bytes,
                                  stride_bytes, swizzle);
}
template <int kDepths>
void hold_factor(unsigned (&)[kDepths][4]) {}
template <int... kSizes>
void warpgroup_arrive([[maybe_unused]] float (&... sums)[kSizes]) {
  emulation::warpgroup_arrive();
}
inline void warpgroup_commit() { emulation::commit_products(); }
template <int kGroups, int... kSizes>
void warpgroup_wait(float (&... sums)[kSizes]) {
  emulation::wait_for_products(kGroups);
  (emulation::expect_complete(sums), ...);
}
template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void take_registers() {}
template <typename T, int kColumns, bool kTransposeA, bool kTransposeB>
void multiply_add_shared(float (&sum)[kColumns / 2], MatrixDescriptor a, MatrixDescriptor b, bool accumulate,
                         EmulationSite where = EmulationSite::current()) {
  emulation::multiply_warpgroup({sum, kColumns, nullptr, a.bits, b.bits, kTransposeA, kTransposeB, accumulate,
                                 [](uint16_t bits) { return to_float(T{bits}); }},
                                where);
}
template <typename T, int kColumns, bool kTransposeB>
void multiply_add_registers(float (&sum)[kColumns / 2], const unsigned (&a)[4], MatrixDescriptor b, bool accumulate,
                            EmulationSite where = EmulationSite::current()) {
  emulation::multiply_warpgroup(
      {sum, kColumns, a, 0, b.bits, false, kTransposeB, accumulate, [](uint16_t bits) { return to_float(T{bits}); }},
      where);
}

#endif

}  // namespace selfforcing::ptx
