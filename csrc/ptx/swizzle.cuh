// Orders of 16-byte chunks in shared memory that the copies of tiles write and the products of warpgroups read (PTX
// ISA, "Tensor: Swizzling modes" and "Asynchronous Warpgroup Level Matrix Shared Memory Layout"; since sm_90).
//
// A row of 32, 64 or 128 bytes has its chunks exchanged by a pattern that repeats every 8 rows' worth of bytes (256,
// 512 or 1,024), so that the chunks of one column lie in different banks. The pattern belongs to the address: tiles
// start where it does.
#pragma once
#include "device.cuh"

namespace selfforcing::ptx {

enum class Swizzle { none, bytes32, bytes64, bytes128 };

// Bytes of a row, which the pattern permutes within itself; without a swizzle one chunk.
__host__ __device__ constexpr int row_bytes(Swizzle swizzle) { return 16 << static_cast<int>(swizzle); }

// Where the byte lies that without a swizzle would be `offset` bytes after the start of the pattern.
__host__ __device__ constexpr int swizzled(Swizzle swizzle, int offset) {
  return offset ^ ((offset >> 7) & (row_bytes(swizzle) / 16 - 1)) << 4;
}

}  // namespace selfforcing::ptx
