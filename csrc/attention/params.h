// One attention call, as its kernels see it. Filled by op.cpp, which has checked everything; kernels trust it.
#pragma once
#include "../geometry/pages.h"
#include "../geometry/parallel.h"
#include "../geometry/spans.h"
#include "../geometry/tensor.h"

namespace selfforcing {

// out = softmax(softmax_scale * q k^T over the visible keys) v. The visible keys of a query are the spans of its block
// in k and v and, if there is a past, the spans of its stream in the pages.
struct AttentionParams {
  DType dtype = DType::float32;
  int32_t batch = 0;
  int32_t num_heads = 0;     // H, of q
  int32_t num_kv_heads = 0;  // of k and v; divides num_heads (query head h reads K/V head h / (H / H_kv))
  int32_t head_dim = 0;      // D, a multiple of 8 up to 256
  int32_t num_queries = 0;   // Lq
  int32_t num_keys = 0;      // Lk, the past not counted
  float softmax_scale = 1.0f;

  ConstHeads q, k, v;    // [B, Lq, H, D], [B, Lk, H_kv, D]
  MutableHeads out;      // [B, Lq, H, D]
  float* lse = nullptr;  // [B, H, Lq] contiguous, natural logarithm; -inf for a row without visible keys (out is 0)

  SpanTable spans;  // rows are queries, columns keys
  PagedPast past;

  Parallel parallel;          // CPU
  void* workspace = nullptr;  // attention_*_workspace_bytes(), 64-byte aligned
  void* stream = nullptr;     // CUDA
};

// Gradients of sum(out * grad_out) + sum(lse * grad_lse).
struct AttentionBackwardParams : AttentionParams {
  SpanTable query_spans;  // the transpose: rows are keys, columns queries; every key lies in exactly one row block
  ConstHeads grad_out;    // [B, Lq, H, D]
  const float* grad_lse = nullptr;      // [B, H, Lq] contiguous, or nullptr
  float* delta = nullptr;               // CUDA: [B, H, Lq], scratch for rowsum(out * grad_out) - grad_lse
  MutableHeads grad_q, grad_k, grad_v;  // shaped like q, k, v; every element is written
  PastGradients past_grads;             // added to
  // In a backward call `out` and `lse` of the base are inputs.
};

// CPU (csrc/attention/cpu.cpp): bytes of workspace needed, then the passes.
int64_t attention_forward_workspace_bytes_cpu(const AttentionParams& params);
void attention_forward_cpu(const AttentionParams& params);
int64_t attention_backward_workspace_bytes_cpu(const AttentionBackwardParams& params);
void attention_backward_cpu(const AttentionBackwardParams& params);

// CUDA (csrc/attention/cuda.cu): launches on params.stream, returns the launch error as cudaError_t (0 is success).
int64_t attention_forward_workspace_bytes_cuda(const AttentionParams& params);
int32_t attention_forward_cuda(const AttentionParams& params);
int64_t attention_backward_workspace_bytes_cuda(const AttentionBackwardParams& params);
int32_t attention_backward_cuda(const AttentionBackwardParams& params);

}  // namespace selfforcing
