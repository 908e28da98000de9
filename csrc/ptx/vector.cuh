// 16 bytes of a tensor at once: the widest access a thread has, and the one that keeps device memory busy.
#pragma once
#include "device.cuh"

namespace selfforcing::ptx {

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements

// st.global.v4.b32 (PTX ISA, "Data Movement and Conversion Instructions: st"): 16 bytes of device memory, aligned
// to 16. Assigned, a uint4 that was put together from elements often becomes four stores of 4 bytes, which take four
// times the transactions: nvcc takes it apart and does not find it again.
__device__ __forceinline__ void store_16_bytes(void* target, uint4 bits) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(bits.x),
               "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *static_cast<uint4*>(target) = bits;
#endif
}

// ld.global.nc.L1::no_allocate (PTX ISA, "ld.global.nc"): 8 or 16 bytes, aligned to their size, that no thread writes
// meanwhile and that are read once: they leave L1 to what is read often.
template <typename Word>
__device__ __forceinline__ Word load_once(const void* source) {
  static_assert(sizeof(Word) == 8 || sizeof(Word) == 16);
  Word word;
#ifdef __CUDACC__
  const size_t address = __cvta_generic_to_global(source);
  if constexpr (sizeof(Word) == 8)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(address));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                 : "l"(address));
#else
  word = *static_cast<const Word*>(source);
#endif
  return word;
}

// 16 bytes starting at `source`. Not aligned to 16 bytes: element by element.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* source, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint4*>(source);
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = source[i];
  uint4 bits;
  memcpy(&bits, elements, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* target, uint4 bits, bool aligned) {
  if (aligned) {
    store_16_bytes(target, bits);
    return;
  }
  T elements[kVector<T>];
  memcpy(elements, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) target[i] = elements[i];
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 bits, float (&values)[kVector<T>]) {
  T elements[kVector<T>];
  memcpy(elements, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kVector<T>]) {
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(values[i]);
  uint4 bits;
  memcpy(&bits, elements, sizeof(bits));
  return bits;
}

}  // namespace selfforcing::ptx
