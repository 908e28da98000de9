// Every schema on one screen. Implementations are registered in csrc/<op>/op.cpp, fake implementations and autograd in
// selfforcing_ext/<op>.py. Layouts: attention tensors [B, L, H, D], latents [B, F, C, H, W], features [B, L, C].
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(selfforcing, m) {
  // Span tables (int32, from selfforcing_ext/mask.py): block_starts, span_offsets [N + 1], spans [S, 2]; key_starts,
  // query_span_offsets, query_spans are their transpose. Past (csrc/geometry/pages.h): pages [P, page_size, H_kv, D],
  // page_table [B, T], past_spans [B, G, S, 4]; quantised pages have scales [P, page_size, H_kv, groups] and may have
  // k_offset [H_kv, D]; rope_table [entries, 2] and rope_grid (frames, rows, columns) rotate keys when they are read.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor block_starts, Tensor span_offsets, Tensor spans, "
      "Tensor key_starts, Tensor query_span_offsets, Tensor query_spans, Tensor? k_pages, Tensor? v_pages, "
      "Tensor? page_table, Tensor? past_spans, Tensor? k_scales, Tensor? v_scales, Tensor? k_offset, "
      "Tensor? rope_table, int[] rope_grid, float softmax_scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor block_starts, Tensor span_offsets, Tensor spans, Tensor key_starts, Tensor query_span_offsets, "
      "Tensor query_spans, Tensor? k_pages, Tensor? v_pages, Tensor? page_table, Tensor? past_spans, "
      "Tensor? k_scales, Tensor? v_scales, Tensor? k_offset, Tensor? rope_table, int[] rope_grid, "
      "float softmax_scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // The same, and the gradients of the past are added to k_grad_pages and v_grad_pages, float32 [P', page_size, H_kv,
  // D], where grad_page_table [B, T] says; -1 there: not wanted.
  m.def(
      "attention_backward_through_past(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor block_starts, Tensor span_offsets, Tensor spans, Tensor key_starts, "
      "Tensor query_span_offsets, Tensor query_spans, Tensor? k_pages, Tensor? v_pages, Tensor? page_table, "
      "Tensor? past_spans, Tensor? k_scales, Tensor? v_scales, Tensor? k_offset, Tensor? rope_table, int[] rope_grid, "
      "float softmax_scale, Tensor(a!) k_grad_pages, Tensor(b!) v_grad_pages, Tensor grad_page_table) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");

  // Into quantised pages (int8, float8_e4m3fn or uint8) what is written is rounded, see csrc/geometry/pages.h.
  m.def(
      "kv_cache_write(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor write_start, Tensor k, "
      "Tensor v, Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None, Tensor? k_offset=None) -> ()");
  // The same of keys [B, L, H_kv * D] as they are projected: qk_norm_rope (below) in the same pass, and its result.
  m.def(
      "kv_cache_norm_rope_write(Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor write_start, "
      "Tensor k, Tensor v, Tensor weight, Tensor start_frame, int[] grid, float eps, Tensor(c!)? k_scales=None, "
      "Tensor(d!)? v_scales=None, Tensor? k_offset=None) -> Tensor");
  // The host's part of a cache (selfforcing_ext/kv_cache.py) as ops, so that a compiled graph can contain it: they
  // change the page table of the cache with this handle and bring the tensors that say where things are up to date; pin
  // copies these tensors and keeps the pages from being recycled as long as the copied table exists; position copies.
  m.def(
      "kv_cache_reserve(Tensor(a!) page_table, Tensor(b!) past_spans, Tensor(c!) write_start, "
      "Tensor(d!) rope_position, Tensor handle, int layer, int num_frames) -> ()");
  m.def(
      "kv_cache_commit(Tensor(a!) past_spans, Tensor(b!) position, Tensor(c!) rope_position, Tensor handle, "
      "int num_frames) -> ()");
  m.def("kv_cache_pin(Tensor page_table, Tensor past_spans, Tensor handle) -> (Tensor page_table, Tensor past_spans)");
  m.def("kv_cache_position(Tensor position) -> Tensor");

  // start_frame: int32 [1] or [B], on the device so that a captured graph replays with new positions.
  m.def("rope_3d(Tensor x, Tensor start_frame, int[] grid, bool inverse) -> Tensor");
  m.def(
      "qk_norm_rope(Tensor x, Tensor weight, Tensor start_frame, int num_heads, int[] grid, float eps) "
      "-> (Tensor y, Tensor rstd)");
  m.def(
      "qk_norm_rope_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, Tensor start_frame, int[] grid) "
      "-> (Tensor grad_x, Tensor grad_weight)");

  // sigma: float32 [B, F]. Noise is given, or drawn with seed and offset, int64 [1] or [B] (csrc/geometry/philox.h), on
  // the device so that a captured graph replays with new noise.
  m.def("denoise_x0(Tensor flow, Tensor? flow_uncond, Tensor x_t, Tensor sigma, float guidance_scale) -> Tensor");
  m.def(
      "denoise_step(Tensor flow, Tensor? flow_uncond, Tensor x_t, Tensor sigma, Tensor sigma_next, "
      "Tensor? noise, Tensor? seed, Tensor? offset, float guidance_scale) -> (Tensor x0, Tensor x_next)");
  // A gradient that is not needed is an empty tensor [0].
  m.def(
      "denoise_backward(Tensor? grad_x0, Tensor? grad_x_next, Tensor sigma, Tensor? sigma_next, float guidance_scale, "
      "bool needs_flow, bool needs_flow_uncond, bool needs_x_t, bool needs_noise) "
      "-> (Tensor grad_flow, Tensor grad_flow_uncond, Tensor grad_x_t, Tensor grad_noise)");
  m.def("add_noise(Tensor x0, Tensor? noise, Tensor? seed, Tensor? offset, Tensor sigma) -> Tensor");
  m.def(
      "dmd_gradient(Tensor x, Tensor x0_fake, Tensor x0_real_cond, Tensor? x0_real_uncond, float guidance_scale) "
      "-> Tensor");

  // shift, scale, gate: float32 [B, F, C].
  m.def(
      "modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "modulated_layer_norm_backward(Tensor grad_y, Tensor x, Tensor scale, Tensor mean, Tensor rstd) "
      "-> (Tensor grad_x, Tensor grad_shift, Tensor grad_scale)");
  m.def("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def("gated_residual_backward(Tensor grad_out, Tensor y, Tensor gate) -> (Tensor grad_y, Tensor grad_gate)");
}
