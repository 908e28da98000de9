// The cached keys and values among the arguments of the attention ops: their checks, and the params made of them.
#pragma once
#include <utility>
#include <vector>

#include "../kernel_call.h"
#include "../page_checks.h"
#include "params.h"

namespace selfforcing {

// The arguments of both ops in the order of their schemas (csrc/ops.cpp): all of the first four or none, then what
// quantised pages and keys that are rotated when read have besides.
struct PastArguments {
  const std::optional<Tensor>& k_pages;     // [P, page_size, H_kv, D]; int4: [.., D / 2]
  const std::optional<Tensor>& v_pages;     // like k_pages
  const std::optional<Tensor>& page_table;  // [B, T]
  const std::optional<Tensor>& spans;       // [B, G, S, 4]
  const std::optional<Tensor>& k_scales;    // [P, page_size, H_kv, groups]
  const std::optional<Tensor>& v_scales;    // like k_scales
  const std::optional<Tensor>& k_offset;    // [H_kv, D]
  const std::optional<Tensor>& rope_table;  // [entries, 2]
  const std::vector<int64_t>& rope_grid;    // frames, rows, columns

  bool given() const { return k_pages.has_value(); }
};

inline void fill_rope(PagedPast& past, const PastArguments& a, const Tensor& q, int64_t head_dim) {
  if (!a.rope_table.has_value()) return;
  check(a.rope_grid.size() == 3, "attention: rope_grid has ", a.rope_grid.size(),
        " sizes, but must have 3: tokens along (frames, rows, columns)");
  for (const int64_t size : a.rope_grid)
    check(size >= 1, "attention: rope_grid has a size of ", size, ", but must have none below 1");
  past.rope_axes = RopeAxes(size_int32(a.rope_grid[0], "attention: rope_grid[0]"),
                            size_int32(a.rope_grid[1], "attention: rope_grid[1]"),
                            size_int32(a.rope_grid[2], "attention: rope_grid[2]"), static_cast<int32_t>(head_dim));
  check_shape(*a.rope_table, "attention: rope_table", "[entries, 2]", {past.rope_axes.table_entries(), 2});
  check_dtype(*a.rope_table, "attention: rope_table", ScalarType::Float);
  check_same_device(*a.rope_table, "attention: rope_table", q, "q");
  check_contiguous(*a.rope_table, "attention: rope_table");
  past.rope_table = a.rope_table->const_data_ptr<float>();
}

inline PagedPast paged_past(const PastArguments& a, const Tensor& q, const Tensor& k) {
  PagedPast past;
  check(a.given() == a.v_pages.has_value() && a.given() == a.page_table.has_value() && a.given() == a.spans.has_value(),
        "attention: k_pages, v_pages, page_table and past_spans must be given together or not at all");
  check(a.given() ||
            !(a.k_scales.has_value() || a.v_scales.has_value() || a.k_offset.has_value() || a.rope_table.has_value()),
        "attention: k_scales, v_scales, k_offset and rope_table are of a past, but k_pages is not given");
  if (!a.given()) return past;
  const int64_t batch = k.size(0), heads = k.size(2), head_dim = k.size(3);
  past.format = page_format("attention", *a.k_pages, q, "q");
  check_pages("attention", past.format, *a.k_pages, *a.v_pages, a.k_scales, a.v_scales, a.k_offset, heads, head_dim, q,
              "q");
  check_shape(*a.page_table, "attention: page_table", "[B, T]", {batch, kAnySize});
  check_shape(*a.spans, "attention: past_spans", "[B, G, S, 4]", {batch, kAnySize, kAnySize, 4});
  check(a.spans->size(1) == 1 || a.spans->size(1) == heads, "attention: past_spans has ", a.spans->size(1),
        " lists per stream, but must have 1 or ", heads, ", one for each head of k");
  check_index_tensor(*a.page_table, "attention: page_table", q, "q");
  check_index_tensor(*a.spans, "attention: past_spans", q, "q");
  past.k_pages = a.k_pages->const_data_ptr();
  past.v_pages = a.v_pages->const_data_ptr();
  past.k_page_stride = a.k_pages->stride(0);
  past.k_token_stride = a.k_pages->stride(1);
  past.k_head_stride = a.k_pages->stride(2);
  past.v_page_stride = a.v_pages->stride(0);
  past.v_token_stride = a.v_pages->stride(1);
  past.v_head_stride = a.v_pages->stride(2);
  past.num_pages = size_int32(a.k_pages->size(0), "attention: k_pages.size(0)");
  past.page_size = size_int32(a.k_pages->size(1), "attention: page_size");
  past.page_table = a.page_table->const_data_ptr<int32_t>();
  past.table_stride = a.page_table->size(1);
  past.spans = reinterpret_cast<const PastSpan*>(a.spans->const_data_ptr<int32_t>());
  past.span_lists = static_cast<int32_t>(a.spans->size(1));
  past.num_spans = size_int32(a.spans->size(2), "attention: past_spans.size(2)");
  if (a.k_scales.has_value()) past.k_scales = static_cast<const uint16_t*>(a.k_scales->const_data_ptr());
  if (a.v_scales.has_value()) past.v_scales = static_cast<const uint16_t*>(a.v_scales->const_data_ptr());
  if (a.k_offset.has_value()) past.k_offset = a.k_offset->const_data_ptr<float>();
  fill_rope(past, a, q, head_dim);
  return past;
}

// Pages for the gradients of the past that the call reads.
inline PastGradients past_gradients(Tensor& k_pages, Tensor& v_pages, const Tensor& page_table,
                                    const PastArguments& past, const Tensor& k) {
  check(past.given(), "attention_backward: k_grad_pages are for the gradients of a past, but k_pages is not given");
  for (const auto& [pages, name] : {std::pair<Tensor&, const char*>{k_pages, "attention_backward: k_grad_pages"},
                                    {v_pages, "attention_backward: v_grad_pages"}}) {
    check_shape(pages, name, "[P', page_size, H_kv, D]",
                {k_pages.size(0), past.k_pages->size(1), k.size(2), k.size(3)});
    check_dtype(pages, name, ScalarType::Float);
    check_same_device(pages, name, k, "k");
    check_contiguous(pages, name);
  }
  check_shape(page_table, "attention_backward: grad_page_table", "[B, T] like page_table",
              {past.page_table->size(0), past.page_table->size(1)});
  check_index_tensor(page_table, "attention_backward: grad_page_table", k, "k");
  return {k_pages.mutable_data_ptr<float>(), v_pages.mutable_data_ptr<float>(), page_table.const_data_ptr<int32_t>()};
}

#ifndef SELFFORCING_WITH_CUDA
// Positions are read from memory, and a wrong one would read anywhere: on the CPU they can be looked at first.
inline void check_past(const PagedPast& past, int64_t batch, int64_t num_pages) {
  const int64_t rope_tokens = past.rope_axes.num_tokens();
  for (int64_t stream = 0; past.k_pages != nullptr && stream < batch; ++stream)
    for (int64_t list = 0; list < past.span_lists; ++list) {
      int64_t previous_end = 0;
      for (int64_t i = 0; i < past.num_spans; ++i) {
        const PastSpan& span = past.spans_of(stream, list)[i];
        const int64_t start = span.start, end = span.end;
        if (start == end) continue;
        check(previous_end <= start && start <= end && end <= past.table_stride * past.page_size,
              "attention: past_spans[", stream, ", ", list, ", ", i, "] is [", start, ", ", end,
              "), but spans must be sorted, disjoint and within the ", past.table_stride, " pages of page_table");
        check(past.rope_table == nullptr || (span.token >= 0 && span.token + (end - start) <= rope_tokens),
              "attention: past_spans[", stream, ", ", list, ", ", i, "] has the tokens [", span.token, ", ",
              span.token + (end - start), "), but rope_grid has ", rope_tokens);
        check(std::isfinite(span.bias), "attention: past_spans[", stream, ", ", list, ", ", i, "] has the bias ",
              span.bias, ", but must have a finite one");
        previous_end = end;
        for (int64_t row = start / past.page_size; row * past.page_size < end; ++row) {
          const int64_t page = past.page_table[stream * past.table_stride + row];
          check(page >= 0 && page < num_pages, "attention: page_table[", stream, ", ", row, "] is ", page,
                ", but must be in [0, ", num_pages, ")");
        }
      }
    }
}

inline void check_past_gradients(const PastGradients& grads, const PagedPast& past, int64_t batch, int64_t num_pages) {
  std::vector<bool> taken(num_pages);  // threads add to different pages
  for (int64_t i = 0; i < batch * past.table_stride; ++i) {
    const int64_t row = i / past.table_stride, column = i % past.table_stride, page = grads.page_table[i];
    check(page >= -1 && page < num_pages, "attention_backward: grad_page_table[", row, ", ", column, "] is ", page,
          ", but must be in [-1, ", num_pages, ")");
    if (page < 0) continue;
    check(!taken[page], "attention_backward: grad_page_table[", row, ", ", column, "] is ", page,
          " again, but a page of gradients must belong to one page of the past");
    taken[page] = true;
  }
}
#endif

}  // namespace selfforcing
