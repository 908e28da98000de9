// Products of small matrices by a warp (PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions"; since sm_80).
//
// Lane l of a warp holds of a 16 x 8 matrix of float32 the elements (l / 4 + 8 i, 2 (l % 4) + j) in register 2 i + j;
// of the 16-bit factors two neighbours in each register: see "Matrix fragments for mma.m16n8k16" there.
#pragma once
#include "async_copy.cuh"

namespace selfforcing::ptx {

// Two floats as two neighbours of type T, `low` first.
template <typename T>
__device__ __forceinline__ unsigned pack_pair(float low, float high);

#ifdef __CUDACC__

template <>
__device__ __forceinline__ unsigned pack_pair<bfloat16>(float low, float high) {
  unsigned bits;  // cvt.rn.bf16x2.f32 takes the upper half first
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

template <>
__device__ __forceinline__ unsigned pack_pair<float16>(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// ldmatrix: four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned). Register i
// gets of matrix i the elements (l / 4, 2 (l % 4)) and the next.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices: elements (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// mma.m16n8k16: sum += a b. `a` is 16 x 16, `b` 16 x 8 (two registers).
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned* b);

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<float16>(float (&sum)[4], const unsigned (&a)[4], const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x; subnormal results are 0 (ex2.approx.ftz).
__device__ __forceinline__ float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

#else

template <typename T>
unsigned pack_pair(float low, float high) {
  return static_cast<unsigned>(from_float<T>(low).bits) | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}
inline void load_matrices(unsigned (&to)[4], SharedAddress row, EmulationSite where = EmulationSite::current()) {
  emulation::load_matrices(to, row, false, where);
}
inline void load_matrices_transposed(unsigned (&to)[4], SharedAddress row,
                                     EmulationSite where = EmulationSite::current()) {
  emulation::load_matrices(to, row, true, where);
}
template <typename T>
void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned* b,
                  EmulationSite where = EmulationSite::current()) {
  emulation::multiply_add(sum, a, b, [](uint16_t bits) { return to_float(T{bits}); }, where);
}
inline float fast_exp2(float x) { return exp2f(x) < 0x1p-126f ? 0.0f : exp2f(x); }

#endif

}  // namespace selfforcing::ptx
