// Spans: all queries of a block see the same few contiguous runs of keys. The table is built by
// selfforcing_ext/mask.py; kernels only read it. Every pointer is on the op's device.
#pragma once
#include <cstdint>

namespace selfforcing {

// Blocks of rows, each with a list of half-open column intervals, sorted and disjoint (CSR).
// Forward: rows are queries, columns keys. Transposed, for backward: rows are keys, columns queries.
struct SpanTable {
  int32_t num_blocks = 0;
  const int32_t* block_starts =
      nullptr;  // [num_blocks + 1]: block i covers rows [block_starts[i], block_starts[i + 1])
  const int32_t* span_offsets =
      nullptr;                     // [num_blocks + 1]: its spans are spans[span_offsets[i] .. span_offsets[i + 1])
  const int32_t* spans = nullptr;  // [num_spans, 2]: [start, end)
};

}  // namespace selfforcing
