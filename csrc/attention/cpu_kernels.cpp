// Attention kernels on the CPU, compiled once per instruction set.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

constexpr int kMaxHeadDim = 256;

struct Float32 {
  using Storage = float;
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float widen(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Storage = _Float16;
  static float widen(_Float16 x) { return static_cast<float>(x); }
  static _Float16 narrow(float x) { return static_cast<_Float16>(x); }
};

template <typename Element>
using Row = const typename Element::Storage*;

template <typename Element>
Row<Element> row_of(const ConstHeads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<Row<Element>>(x.data) + batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
}

template <typename Element>
typename Element::Storage* row_of(const MutableHeads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<typename Element::Storage*>(x.data) + batch * x.batch_stride + token * x.token_stride +
         head * x.head_stride;
}

template <typename Element>
void load_row(float* to, Row<Element> from, int dim) {
  for (int d = 0; d < dim; ++d) to[d] = Element::widen(from[d]);
}

template <typename Element>
void store_row(typename Element::Storage* to, const float* from, float factor, int dim) {
  for (int d = 0; d < dim; ++d) to[d] = Element::narrow(factor * from[d]);
}

float dot(const float* a, const float* b, int dim) {
  float partial[16] = {};
  for (int d = 0; d < dim; d += 8)
    for (int lane = 0; lane < 8; ++lane) partial[lane] += a[d + lane] * b[d + lane];
  float sum = 0;
  for (float value : partial) sum += value;
  return sum;
}

int block_of(const SpanTable& table, int row) {
  int block = 0;
  while (row >= table.block_starts[block + 1]) ++block;
  return block;
}

// Calls visit(k row, v row, key) for every key that a query sees; key is -1 for the past.
template <typename Element, typename Visit>
void for_each_visible_key(const AttentionParams& p, int batch, int kv_head, int query, const Visit& visit) {
  const PagedPast& past = p.past;
  if (past.k_pages != nullptr) {
    for (int span = 0; span < past.num_spans; ++span) {
      const int32_t* ends = past.spans + 2 * (static_cast<int64_t>(batch) * past.num_spans + span);
      for (int position = ends[0]; position < ends[1]; ++position) {
        const int64_t page = past.page_table[batch * past.table_stride + position / past.page_size];
        const int64_t slot = position % past.page_size;
        visit(static_cast<Row<Element>>(past.k_pages) + page * past.k_page_stride + slot * past.k_token_stride +
                  kv_head * past.k_head_stride,
              static_cast<Row<Element>>(past.v_pages) + page * past.v_page_stride + slot * past.v_token_stride +
                  kv_head * past.v_head_stride,
              -1);
      }
    }
  }
  if (p.spans.num_blocks == 0) return;
  const int block = block_of(p.spans, query);
  for (int span = p.spans.span_offsets[block]; span < p.spans.span_offsets[block + 1]; ++span)
    for (int key = p.spans.spans[2 * span]; key < p.spans.spans[2 * span + 1]; ++key)
      visit(row_of<Element>(p.k, batch, key, kv_head), row_of<Element>(p.v, batch, key, kv_head), key);
}

template <typename Element>
void forward_query(const AttentionParams& p, int batch, int head, int query) {
  const int dim = p.head_dim, kv_head = head / (p.num_heads / p.num_kv_heads);
  alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim], sum[kMaxHeadDim] = {};
  load_row<Element>(q, row_of<Element>(p.q, batch, query, head), dim);
  float largest = -INFINITY, denominator = 0;
  for_each_visible_key<Element>(p, batch, kv_head, query, [&](Row<Element> k_row, Row<Element> v_row, int) {
    load_row<Element>(k, k_row, dim);
    load_row<Element>(v, v_row, dim);
    const float score = p.softmax_scale * dot(q, k, dim);
    const float before = largest;
    largest = score > largest ? score : largest;
    const float rescale = expf(before - largest), weight = expf(score - largest);
    denominator = denominator * rescale + weight;
    for (int d = 0; d < dim; ++d) sum[d] = sum[d] * rescale + weight * v[d];
  });
  store_row<Element>(row_of<Element>(p.out, batch, query, head), sum, denominator > 0 ? 1 / denominator : 0, dim);
  p.lse[(static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + query] =
      denominator > 0 ? largest + logf(denominator) : -INFINITY;
}

template <typename Element>
void backward_query(const AttentionBackwardParams& p, int batch, int head, int query) {
  const int dim = p.head_dim, kv_head = head / (p.num_heads / p.num_kv_heads);
  const int64_t row = (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + query;
  alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim], grad[kMaxHeadDim], sum[kMaxHeadDim] = {};
  load_row<Element>(grad, row_of<Element>(p.grad_out, batch, query, head), dim);
  load_row<Element>(q,
                    row_of<Element>(ConstHeads{p.out.data, p.out.batch_stride, p.out.token_stride, p.out.head_stride},
                                    batch, query, head),
                    dim);
  const float delta = dot(grad, q, dim) - (p.grad_lse != nullptr ? p.grad_lse[row] : 0);
  p.delta[row] = delta;
  load_row<Element>(q, row_of<Element>(p.q, batch, query, head), dim);
  for_each_visible_key<Element>(p, batch, kv_head, query, [&](Row<Element> k_row, Row<Element> v_row, int) {
    load_row<Element>(k, k_row, dim);
    load_row<Element>(v, v_row, dim);
    const float probability = expf(p.softmax_scale * dot(q, k, dim) - p.lse[row]);
    const float grad_score = probability * (dot(grad, v, dim) - delta);
    for (int d = 0; d < dim; ++d) sum[d] += grad_score * k[d];
  });
  store_row<Element>(row_of<Element>(p.grad_q, batch, query, head), sum, p.softmax_scale, dim);
}

template <typename Element>
void backward_key(const AttentionBackwardParams& p, int batch, int kv_head, int key) {
  const int dim = p.head_dim, group = p.num_heads / p.num_kv_heads;
  alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim], grad[kMaxHeadDim];
  alignas(64) float sum_k[kMaxHeadDim] = {}, sum_v[kMaxHeadDim] = {};
  load_row<Element>(k, row_of<Element>(p.k, batch, key, kv_head), dim);
  load_row<Element>(v, row_of<Element>(p.v, batch, key, kv_head), dim);
  const int run = block_of(p.query_spans, key);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int span = p.query_spans.span_offsets[run]; span < p.query_spans.span_offsets[run + 1]; ++span)
      for (int query = p.query_spans.spans[2 * span]; query < p.query_spans.spans[2 * span + 1]; ++query) {
        const int64_t row = (static_cast<int64_t>(batch) * p.num_heads + head) * p.num_queries + query;
        load_row<Element>(q, row_of<Element>(p.q, batch, query, head), dim);
        load_row<Element>(grad, row_of<Element>(p.grad_out, batch, query, head), dim);
        const float probability = expf(p.softmax_scale * dot(q, k, dim) - p.lse[row]);
        const float grad_score = probability * (dot(grad, v, dim) - p.delta[row]);
        for (int d = 0; d < dim; ++d) {
          sum_k[d] += grad_score * q[d];
          sum_v[d] += probability * grad[d];
        }
      }
  store_row<Element>(row_of<Element>(p.grad_k, batch, key, kv_head), sum_k, p.softmax_scale, dim);
  store_row<Element>(row_of<Element>(p.grad_v, batch, key, kv_head), sum_v, 1, dim);
}

template <typename Element>
void forward(const AttentionParams& p) {
  p.parallel.for_each(static_cast<int64_t>(p.batch) * p.num_heads * p.num_queries, [&](int64_t item, int32_t) {
    const int64_t head_item = item / p.num_queries;
    forward_query<Element>(p, head_item / p.num_heads, head_item % p.num_heads, item % p.num_queries);
  });
}

template <typename Element>
void backward(const AttentionBackwardParams& p) {
  p.parallel.for_each(static_cast<int64_t>(p.batch) * p.num_heads * p.num_queries, [&](int64_t item, int32_t) {
    const int64_t head_item = item / p.num_queries;
    backward_query<Element>(p, head_item / p.num_heads, head_item % p.num_heads, item % p.num_queries);
  });
  p.parallel.for_each(static_cast<int64_t>(p.batch) * p.num_kv_heads * p.num_keys, [&](int64_t item, int32_t) {
    const int64_t head_item = item / p.num_keys;
    backward_key<Element>(p, head_item / p.num_kv_heads, head_item % p.num_kv_heads, item % p.num_keys);
  });
}

}  // namespace

int64_t attention_forward_workspace_bytes(const AttentionParams&) { return 0; }
int64_t attention_backward_workspace_bytes(const AttentionBackwardParams&) { return 0; }

void attention_forward(const AttentionParams& params) {
  switch (params.dtype) {
    case DType::float32: return forward<Float32>(params);
    case DType::bfloat16: return forward<BFloat16>(params);
    case DType::float16: return forward<Float16>(params);
  }
}

void attention_backward(const AttentionBackwardParams& params) {
  switch (params.dtype) {
    case DType::float32: return backward<Float32>(params);
    case DType::bfloat16: return backward<BFloat16>(params);
    case DType::float16: return backward<Float16>(params);
  }
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
