// What an attention call is divided into: panels of queries, tiles of keys, and the memory they are packed in.
#pragma once
#include "cpu_operand.h"
#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

inline constexpr int kKeyMultiple = 8;  // rows of a packed tile of keys are padded to this
inline constexpr int kMaxPanelVectors = 3;
inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Hands out 64-byte aligned pieces of the workspace, or only counts them when there is none yet.
class Arena {
 public:
  explicit Arena(void* start) : start_(static_cast<char*>(start)) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + offset);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

template <typename Op>
using Row = const typename Op::Storage*;

template <typename Op>
SELFFORCING_INLINE Row<Op> row_of(const ConstHeads& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<Row<Op>>(x.data) + batch * x.batch_stride + head * x.head_stride + token * x.token_stride;
}

template <typename Op>
SELFFORCING_INLINE typename Op::Storage* row_of(const MutableHeads& x, int64_t batch, int64_t head, int64_t token) {
  return static_cast<typename Op::Storage*>(x.data) + batch * x.batch_stride + head * x.head_stride +
         token * x.token_stride;
}

// Up to three vectors of queries of one block. Lanes count over all panels, so that packed panels lie side by side.
struct Panel {
  int32_t query, count;   // queries [query, query + count)
  int32_t lane, vectors;  // lanes [lane, lane + vectors * kLanes)
};

// Pairs of vectors fill a tile of accumulators best; an odd rest makes one panel of three, or of one if alone.
template <typename Visit>
void for_each_panel(const SpanTable& spans, const Visit& visit) {
  int lane = 0;
  for (int block = 0; block < spans.num_blocks; ++block) {
    const int end = spans.block_starts[block + 1];
    for (int query = spans.block_starts[block]; query < end;) {
      const int left = (end - query + kLanes - 1) / kLanes;
      const int vectors = left == 1 || left == 3 ? left : 2;
      const int count = end - query < vectors * kLanes ? end - query : vectors * kLanes;
      visit(Panel{query, count, lane, vectors}, block);
      query += count;
      lane += vectors * kLanes;
    }
  }
}

// Calls call(int_constant) with the number of vectors of a panel as a compile-time constant.
template <int value>
struct IntConstant {
  static constexpr int kValue = value;
};

template <typename Call>
SELFFORCING_INLINE void with_vectors(int vectors, const Call& call) {
  switch (vectors) {
    case 1: return call(IntConstant<1>{});
    case 2: return call(IntConstant<2>{});
    default: return call(IntConstant<3>{});
  }
}

// A run of keys and values that lie at equal distances.
template <typename Op>
struct KeyRun {
  Row<Op> k, v;
  int64_t k_stride, v_stride;
  int count;
};

// Rows lie a token apart, farther than the hardware looks ahead: asks for a row some rows before it is needed.
inline constexpr int kPrefetchRows = 8;

template <typename Op>
SELFFORCING_INLINE void prefetch_row(Row<Op> row, int dim) {
  constexpr int kCacheLine = 64 / sizeof(typename Op::Storage);
  for (int d = 0; d < dim; d += kCacheLine) __builtin_prefetch(row + d);
}

// Walks over the keys that a block sees, as its stream of the batch has them: the past, then the spans.
template <typename Op>
class VisibleKeys {
 public:
  // block < 0: the past alone.
  VisibleKeys(const AttentionParams& p, int batch, int kv_head, int block) : p_(p), batch_(batch), kv_head_(kv_head) {
    if (p.past.k_pages != nullptr) {
      past_span_ = p.past.spans_of(batch, kv_head);
      past_end_ = past_span_ + p.past.num_spans;
    }
    if (block >= 0) {
      span_ = p.spans.spans + static_cast<int64_t>(p.spans.span_offsets[block]) * 2;
      end_ = p.spans.spans + static_cast<int64_t>(p.spans.span_offsets[block + 1]) * 2;
    }
  }

  int64_t count() const {
    int64_t total = -done_;
    for (const PastSpan* span = past_span_; span < past_end_; ++span) total += span->end - span->start;
    for (const int32_t* span = span_; span < end_; span += 2) total += span[1] - span[0];
    return total;
  }

  // The next run, of at most `most` keys; its count is 0 at the end.
  KeyRun<Op> next(int most) {
    for (; past_span_ < past_end_; ++past_span_, done_ = 0) {
      const int position = past_span_->start + done_, left = past_span_->end - position;
      if (left <= 0) continue;
      const PagedPast& past = p_.past;
      const int slot = position % past.page_size;
      const int64_t page = past.page_table[batch_ * past.table_stride + position / past.page_size];
      const int count = smallest(most, left, past.page_size - slot);
      done_ += count;
      return {static_cast<Row<Op>>(past.k_pages) + page * past.k_page_stride + slot * past.k_token_stride +
                  kv_head_ * past.k_head_stride,
              static_cast<Row<Op>>(past.v_pages) + page * past.v_page_stride + slot * past.v_token_stride +
                  kv_head_ * past.v_head_stride,
              past.k_token_stride, past.v_token_stride, count};
    }
    for (; span_ < end_; span_ += 2, done_ = 0) {
      const int key = span_[0] + done_, left = span_[1] - key;
      if (left <= 0) continue;
      const int count = smallest(most, left, left);
      done_ += count;
      return {row_of<Op>(p_.k, batch_, kv_head_, key), row_of<Op>(p_.v, batch_, kv_head_, key), p_.k.token_stride,
              p_.v.token_stride, count};
    }
    return {nullptr, nullptr, 0, 0, 0};
  }

  void skip(int64_t count) {
    constexpr int kMost = 1 << 30;
    while (count > 0) count -= next(count < kMost ? static_cast<int>(count) : kMost).count;
  }

 private:
  static int smallest(int a, int b, int c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }

  const AttentionParams& p_;
  int batch_, kv_head_;
  const PastSpan *past_span_ = nullptr, *past_end_ = nullptr;  // spans of the past still to walk over
  const int32_t *span_ = nullptr, *end_ = nullptr;             // spans of the call's own keys
  int done_ = 0;                                               // keys of the current span
};

// `count` things in as few tiles of at most `most` as possible, of nearly equal size: a multiple of kKeyMultiple.
SELFFORCING_INLINE int tile_size(int64_t count, int most) {
  const int64_t tiles = (count + most - 1) / most;
  return tiles == 0 ? 0 : round_up(static_cast<int>((count + tiles - 1) / tiles), kKeyMultiple);
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
