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

// Cached keys and values of one layer, in pages, seen by every query of the call (the past of the block).
// Position p of stream b lies in page page_table[b][p / page_size] at offset p % page_size.
struct PagedPast {
  const void* k_pages = nullptr;  // [num_pages, page_size, H_kv, D]; nullptr: there is no past
  const void* v_pages = nullptr;
  int64_t k_page_stride = 0, k_token_stride = 0, k_head_stride = 0;  // in elements
  int64_t v_page_stride = 0, v_token_stride = 0, v_head_stride = 0;
  int32_t page_size = 0;
  const int32_t* page_table = nullptr;  // [B, table_stride]: page numbers
  int64_t table_stride = 0;
  const int32_t* spans =
      nullptr;  // [B, num_spans, 2]: visible positions of each stream, sorted, disjoint, may be empty
  int32_t num_spans = 0;
};

}  // namespace selfforcing
