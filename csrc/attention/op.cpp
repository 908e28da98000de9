// selfforcing::attention and attention_backward: checks, allocation, then the params of the kernels.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "op_past.h"

namespace selfforcing {
namespace {

constexpr int64_t kMaxHeadDim = 256, kHeadDimMultiple = 8;

// Where the keys are: the arguments after q, k, v of both ops (csrc/ops.cpp).
struct Geometry {
  const Tensor& block_starts;        // [N + 1]
  const Tensor& span_offsets;        // [N + 1]
  const Tensor& spans;               // [S, 2]
  const Tensor& key_starts;          // [M + 1]
  const Tensor& query_span_offsets;  // [M + 1]
  const Tensor& query_spans;         // [R, 2]
  const PastArguments past;
};

SpanTable span_table(const Tensor& starts, const char* starts_name, const Tensor& offsets, const char* offsets_name,
                     const Tensor& spans, const char* spans_name, const Tensor& q) {
  check_shape(starts, starts_name, "[N + 1]", {kAnySize});
  check(starts.size(0) >= 1, starts_name, " has shape ", shape_text(starts), ", but must have at least one element");
  check_shape(offsets, offsets_name, "[N + 1]", {starts.size(0)});
  check_shape(spans, spans_name, "[S, 2]", {kAnySize, 2});
  check_index_tensor(starts, starts_name, q, "q");
  check_index_tensor(offsets, offsets_name, q, "q");
  check_index_tensor(spans, spans_name, q, "q");
  SpanTable table;
  table.num_blocks = size_int32(starts.size(0) - 1, starts_name);
  table.block_starts = starts.const_data_ptr<int32_t>();
  table.span_offsets = offsets.const_data_ptr<int32_t>();
  table.spans = spans.const_data_ptr<int32_t>();
  return table;
}

#ifndef SELFFORCING_WITH_CUDA
// Positions are read from memory, and a wrong one would read anywhere: on the CPU they can be looked at first.
void check_spans(const SpanTable& table, int64_t num_rows, int64_t num_columns, int64_t num_spans, const char* rows,
                 const char* columns) {
  const int32_t* starts = table.block_starts;
  check(starts[0] == 0 && starts[table.num_blocks] == num_rows, "attention: the blocks of the span table cover ", rows,
        " [", starts[0], ", ", starts[table.num_blocks], "), but must cover [0, ", num_rows, ")");
  check(table.span_offsets[0] == 0 && table.span_offsets[table.num_blocks] == num_spans,
        "attention: the offsets of the span table run to ", table.span_offsets[table.num_blocks],
        ", but must run from 0 to its number of spans, ", num_spans);
  // All offsets before any span: between a first and a last one that are right, one may point anywhere.
  for (int32_t block = 0; block < table.num_blocks; ++block)
    check(starts[block] <= starts[block + 1] && table.span_offsets[block] <= table.span_offsets[block + 1],
          "attention: block ", block, " of the span table ends before it starts");
  for (int32_t block = 0; block < table.num_blocks; ++block) {
    int64_t previous_end = 0;
    for (int32_t i = table.span_offsets[block]; i < table.span_offsets[block + 1]; ++i) {
      const int64_t start = table.spans[2 * i], end = table.spans[2 * i + 1];
      check(previous_end <= start && start <= end && end <= num_columns, "attention: span ", i, " of ", columns,
            " is [", start, ", ", end, "), but spans must be sorted, disjoint and within [0, ", num_columns, ")");
      previous_end = end;
    }
  }
}
#endif

// Everything but outputs and workspace.
void fill_params(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Geometry& g,
                 double softmax_scale) {
  p.dtype = check_float_dtype(q, "attention: q");
  check_shape(q, "attention: q", "[B, Lq, H, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = q.size(0), heads = q.size(2), head_dim = q.size(3);
  check(head_dim >= kHeadDimMultiple && head_dim <= kMaxHeadDim && head_dim % kHeadDimMultiple == 0,
        "attention: q has head dim ", head_dim, ", but must have a multiple of ", kHeadDimMultiple, " up to ",
        kMaxHeadDim);
  check_shape(k, "attention: k", "[B, Lk, H_kv, D]", {batch, kAnySize, kAnySize, head_dim});
  const int64_t kv_heads = k.size(2);
  check(kv_heads >= 1 && heads % kv_heads == 0, "attention: k has ", kv_heads,
        " heads, but must have a number that divides the ", heads, " heads of q");
  check_shape(v, "attention: v", "[B, Lk, H_kv, D] like k", {batch, k.size(1), kv_heads, head_dim});
  for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{k, "attention: k"}, {v, "attention: v"}}) {
    check_same_dtype(tensor, name, q, "q");
    check_same_device(tensor, name, q, "q");
    check_last_dim_contiguous(tensor, name);
  }
  check_last_dim_contiguous(q, "attention: q");
  check(std::isfinite(softmax_scale), "attention: softmax_scale is ", softmax_scale, ", but must be finite");

  p.batch = size_int32(batch, "attention: B");
  p.num_heads = size_int32(heads, "attention: H");
  p.num_kv_heads = size_int32(kv_heads, "attention: H_kv");
  p.head_dim = static_cast<int32_t>(head_dim);
  p.num_queries = size_int32(q.size(1), "attention: Lq");
  p.num_keys = size_int32(k.size(1), "attention: Lk");
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.q = const_heads(q);
  p.k = const_heads(k);
  p.v = const_heads(v);
  p.spans = span_table(g.block_starts, "attention: block_starts", g.span_offsets, "attention: span_offsets", g.spans,
                       "attention: spans", q);
  p.past = paged_past(g.past, q, k);
#ifndef SELFFORCING_WITH_CUDA
  check_spans(p.spans, p.num_queries, p.num_keys, g.spans.size(0), "queries", "spans");
  if (g.past.given()) check_past(p.past, batch, g.past.k_pages->size(0));
  p.parallel = torch_threads();
#endif
}

// A workspace aligned to 64 bytes, if the kernels want one; the tensor keeps it alive. How many bytes depends on the
// device.
template <typename Params>
std::optional<Tensor> workspace(Params& p, int64_t (*bytes)(const Params&), const Tensor& like) {
  constexpr int64_t kAlignment = 64;
#ifdef SELFFORCING_WITH_CUDA
  const CudaStreamGuard guard(like);
#endif
  const int64_t wanted = bytes(p);
  if (wanted == 0) return std::nullopt;
  Tensor memory = empty_bytes(wanted + kAlignment, like);
  const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  p.workspace = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  return memory;
}

Tensor empty_like_contiguous(const Tensor& tensor) { return new_tensor(tensor.sizes(), tensor); }

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_starts,
                                     const Tensor& span_offsets, const Tensor& spans, const Tensor& key_starts,
                                     const Tensor& query_span_offsets, const Tensor& query_spans,
                                     const std::optional<Tensor>& k_pages, const std::optional<Tensor>& v_pages,
                                     const std::optional<Tensor>& page_table, const std::optional<Tensor>& past_spans,
                                     const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                     const std::optional<Tensor>& k_offset, const std::optional<Tensor>& rope_table,
                                     const std::vector<int64_t>& rope_grid, double softmax_scale) {
  const PastArguments past{k_pages,  v_pages,  page_table, past_spans, k_scales,
                           v_scales, k_offset, rope_table, rope_grid};
  const Geometry geometry{block_starts, span_offsets, spans, key_starts, query_span_offsets, query_spans, past};
  AttentionParams p;
  fill_params(p, q, k, v, geometry, softmax_scale);
  Tensor out = empty_like_contiguous(q);
  Tensor lse = empty_floats<3>({q.size(0), q.size(2), q.size(1)}, q);
  if (q.numel() == 0) return {out, lse};
  p.out = mutable_heads(out);
  p.lse = lse.mutable_data_ptr<float>();
  const std::optional<Tensor> memory = workspace(p, SELFFORCING_KERNEL(attention_forward_workspace_bytes), q);
  run_kernel("attention", SELFFORCING_KERNEL(attention_forward), p, q);
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of q, k, v

// Where attention_backward_through_past adds the gradients of the past.
struct GradPages {
  Tensor &k_pages, &v_pages;
  const Tensor& page_table;
};

Gradients differentiate(const Tensor& given_grad_out, const std::optional<Tensor>& given_grad_lse, const Tensor& q,
                        const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const Geometry& g,
                        double softmax_scale, const GradPages* grad_pages) {
  AttentionBackwardParams p;
  fill_params(p, q, k, v, g, softmax_scale);
  // Autograd may hand over anything, such as the expanded gradient of a sum.
  const Tensor grad_out = with_contiguous_last_dim(given_grad_out);
  std::optional<Tensor> grad_lse;
  if (given_grad_lse.has_value()) grad_lse = torch::stable::contiguous(*given_grad_lse);
  for (const auto& [tensor, name] : {std::pair<const Tensor&, const char*>{grad_out, "attention_backward: grad_out"},
                                     {out, "attention_backward: out"}}) {
    check_shape(tensor, name, "[B, Lq, H, D] like q", {q.size(0), q.size(1), q.size(2), q.size(3)});
    check_same_dtype(tensor, name, q, "q");
    check_same_device(tensor, name, q, "q");
    check_last_dim_contiguous(tensor, name);
  }
  const auto check_lse = [&](const Tensor& tensor, const char* name) {
    check_shape(tensor, name, "[B, H, Lq]", {q.size(0), q.size(2), q.size(1)});
    check_dtype(tensor, name, ScalarType::Float);
    check_same_device(tensor, name, q, "q");
    check_contiguous(tensor, name);
  };
  check_lse(lse, "attention_backward: lse");
  if (grad_lse.has_value()) check_lse(*grad_lse, "attention_backward: grad_lse");
  p.query_spans =
      span_table(g.key_starts, "attention_backward: key_starts", g.query_span_offsets,
                 "attention_backward: query_span_offsets", g.query_spans, "attention_backward: query_spans", q);
  if (grad_pages != nullptr)
    p.past_grads = past_gradients(grad_pages->k_pages, grad_pages->v_pages, grad_pages->page_table, g.past, k);
#ifndef SELFFORCING_WITH_CUDA
  if (grad_pages != nullptr) check_past_gradients(p.past_grads, p.past, p.batch, grad_pages->k_pages.size(0));
  check_spans(p.query_spans, p.num_keys, p.num_queries, g.query_spans.size(0), "keys", "query_spans");
#endif

  Tensor grad_q = empty_like_contiguous(q), grad_k = empty_like_contiguous(k), grad_v = empty_like_contiguous(v);
  // The kernels read out and lse here; the base params name them without const because the forward writes them.
  p.out = {out.data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  p.lse = static_cast<float*>(lse.data_ptr());
  p.grad_out = const_heads(grad_out);
  p.grad_lse = grad_lse.has_value() ? grad_lse->const_data_ptr<float>() : nullptr;
#ifdef SELFFORCING_WITH_CUDA
  Tensor delta = empty_like_contiguous(lse);
  p.delta = delta.mutable_data_ptr<float>();
#endif
  p.grad_q = mutable_heads(grad_q);
  p.grad_k = mutable_heads(grad_k);
  p.grad_v = mutable_heads(grad_v);
  if (q.numel() == 0 || k.numel() == 0) {
    for (Tensor* grad : {&grad_q, &grad_k, &grad_v}) torch::stable::zero_(*grad);
    if (q.numel() == 0 || p.past.k_pages == nullptr) return {grad_q, grad_k, grad_v};
  }
  const std::optional<Tensor> memory = workspace(p, SELFFORCING_KERNEL(attention_backward_workspace_bytes), q);
  run_kernel("attention_backward", SELFFORCING_KERNEL(attention_backward), p, q);
  return {grad_q, grad_k, grad_v};
}

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             const Tensor& block_starts, const Tensor& span_offsets, const Tensor& spans,
                             const Tensor& key_starts, const Tensor& query_span_offsets, const Tensor& query_spans,
                             const std::optional<Tensor>& k_pages, const std::optional<Tensor>& v_pages,
                             const std::optional<Tensor>& page_table, const std::optional<Tensor>& past_spans,
                             const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                             const std::optional<Tensor>& k_offset, const std::optional<Tensor>& rope_table,
                             const std::vector<int64_t>& rope_grid, double softmax_scale) {
  const PastArguments past{k_pages,  v_pages,  page_table, past_spans, k_scales,
                           v_scales, k_offset, rope_table, rope_grid};
  const Geometry geometry{block_starts, span_offsets, spans, key_starts, query_span_offsets, query_spans, past};
  return differentiate(grad_out, grad_lse, q, k, v, out, lse, geometry, softmax_scale, nullptr);
}

Gradients attention_backward_through_past(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& block_starts, const Tensor& span_offsets, const Tensor& spans,
    const Tensor& key_starts, const Tensor& query_span_offsets, const Tensor& query_spans,
    const std::optional<Tensor>& k_pages, const std::optional<Tensor>& v_pages, const std::optional<Tensor>& page_table,
    const std::optional<Tensor>& past_spans, const std::optional<Tensor>& k_scales,
    const std::optional<Tensor>& v_scales, const std::optional<Tensor>& k_offset,
    const std::optional<Tensor>& rope_table, const std::vector<int64_t>& rope_grid, double softmax_scale,
    Tensor k_grad_pages, Tensor v_grad_pages, const Tensor& grad_page_table) {
  const PastArguments past{k_pages,  v_pages,  page_table, past_spans, k_scales,
                           v_scales, k_offset, rope_table, rope_grid};
  const Geometry geometry{block_starts, span_offsets, spans, key_starts, query_span_offsets, query_spans, past};
  const GradPages grad_pages{k_grad_pages, v_grad_pages, grad_page_table};
  return differentiate(grad_out, grad_lse, q, k, v, out, lse, geometry, softmax_scale, &grad_pages);
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("attention", TORCH_BOX(&selfforcing::attention));
  m.impl("attention_backward", TORCH_BOX(&selfforcing::attention_backward));
  m.impl("attention_backward_through_past", TORCH_BOX(&selfforcing::attention_backward_through_past));
}
