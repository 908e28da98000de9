// Cached keys and values of one layer, in pages, as attention reads them. Every pointer is on the op's device.
//
// Position p of stream b lies in page page_table[b][p / page_size] at offset p % page_size. Which positions a K/V head
// of a stream sees is a short list of spans, sorted and disjoint; a span may be empty.
#pragma once
#include <cstdint>

#include "rope_axes.h"

namespace selfforcing {

// How a page holds its elements. All but the first have one bfloat16 scale per token and head, int4 one per group of
// kInt4Group channels: an element is its integer (or fp8) value times the scale, and for keys plus k_offset of its
// channel.
enum class PageFormat : int32_t {
  elements = 0,  // those of q
  int8 = 1,
  fp8_e4m3 = 2,
  int4 = 3,  // value + 8 in four bits: byte j of a group's 16 holds its channels j (low bits) and j + 16 (high bits)
};

inline constexpr int32_t kInt4Group = 32;

// A row of the tensor past_spans, int32 [B, G, S, 4].
struct PastSpan {
  int32_t start, end;  // positions [start, end)
  int32_t token;       // with keys that are rotated when read: number of its first token, see PagedPast::rope_table
  float bias;          // added to the scores (already scaled), in natural units
};
static_assert(sizeof(PastSpan) == 4 * sizeof(int32_t));

struct PagedPast {
  const void* k_pages = nullptr;  // [num_pages, page_size, H_kv, D (int4: D / 2)]; nullptr: there is no past
  const void* v_pages = nullptr;
  int64_t k_page_stride = 0, k_token_stride = 0, k_head_stride = 0;  // in elements as stored: int4 in bytes
  int64_t v_page_stride = 0, v_token_stride = 0, v_head_stride = 0;
  PageFormat format = PageFormat::elements;
  const uint16_t* k_scales = nullptr;  // bfloat16 [num_pages, page_size, H_kv, 1 (int4: D / kInt4Group)], contiguous
  const uint16_t* v_scales = nullptr;
  const float* k_offset = nullptr;  // [H_kv, D], or nullptr

  int32_t num_pages = 0;
  int32_t page_size = 0;
  const int32_t* page_table = nullptr;  // [B, table_stride]: page numbers
  int64_t table_stride = 0;

  const PastSpan* spans = nullptr;  // [B, span_lists, num_spans]
  int32_t span_lists = 1;           // per stream: 1, which all heads share, or H_kv
  int32_t num_spans = 0;

  // With a table keys are stored as they are before rotary embedding, and token t stands at frame t / (rows columns),
  // row and column of `rope_axes`: the table has the cosine and the sine of every pair at every position of every axis
  // (RopeAxes::table_offset), float32.
  const float* rope_table = nullptr;
  RopeAxes rope_axes;

  SELFFORCING_HOST_DEVICE const PastSpan* spans_of(int64_t stream, int64_t kv_head) const {
    return spans + (stream * span_lists + (span_lists == 1 ? 0 : kv_head)) * num_spans;
  }
};

// Where the gradients of cached keys and values are summed: the row that page_table gives a page has here a page of
// gradients, or -1 where none is wanted. They are of the keys as stored, that is before rotation where that is done on
// reading.
struct PastGradients {
  float* k_pages = nullptr;  // [num_grad_pages, page_size, H_kv, D], contiguous; nullptr: the past is constant
  float* v_pages = nullptr;
  const int32_t* page_table = nullptr;  // [B, table_stride of the past]
};

}  // namespace selfforcing
