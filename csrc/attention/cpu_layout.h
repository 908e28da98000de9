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

// Keys of the past that a K/V head of a stream sees.
inline int64_t num_past_keys(const PagedPast& past, int64_t batch, int64_t kv_head) {
  int64_t keys = 0;
  if (past.k_pages == nullptr) return keys;
  const PastSpan* spans = past.spans_of(batch, kv_head);
  for (int i = 0; i < past.num_spans; ++i) keys += spans[i].end - spans[i].start;
  return keys;
}

// The call's own keys that a block sees.
inline int64_t num_block_keys(const SpanTable& table, int block) {
  int64_t keys = 0;
  for (int i = table.span_offsets[block]; i < table.span_offsets[block + 1]; ++i)
    keys += table.spans[2 * i + 1] - table.spans[2 * i];
  return keys;
}

inline int64_t num_visible_keys(const AttentionParams& p, int batch, int kv_head, int block) {
  return num_past_keys(p.past, batch, kv_head) + num_block_keys(p.spans, block);
}

// Neighbouring keys of one span: positions of the past, all in one page, or the call's own keys.
struct KeyPlace {
  const PastSpan* past;  // nullptr: the call's own
  int first, count;
};

// The token that the first of these keys of the past is, with keys that are rotated when read.
inline int32_t token_of(const KeyPlace& place) { return place.past->token + place.first - place.past->start; }

// Keys whose scores get the same bias.
struct KeyStretch {
  int64_t count;
  float bias;
};

// Walks over the keys that a block sees, as a K/V head of a stream has them: the past, then the spans.
class KeyWalk {
 public:
  // block < 0: the past alone.
  KeyWalk(const AttentionParams& p, int batch, int kv_head, int block) : page_size_(p.past.page_size) {
    if (p.past.k_pages != nullptr) {
      past_span_ = p.past.spans_of(batch, kv_head);
      past_end_ = past_span_ + p.past.num_spans;
    }
    if (block >= 0) {
      span_ = p.spans.spans + static_cast<int64_t>(p.spans.span_offsets[block]) * 2;
      end_ = p.spans.spans + static_cast<int64_t>(p.spans.span_offsets[block + 1]) * 2;
    }
  }

  // How many of the next keys, at most `most`, have one bias.
  KeyStretch stretch(int64_t most) const {
    KeyStretch keys{0, 0};
    int done = done_;
    for (const PastSpan* span = past_span_; span < past_end_; ++span, done = 0) {
      const int left = span->end - span->start - done;
      if (left == 0) continue;
      if (keys.count > 0 && span->bias != keys.bias) return keys;
      keys = {keys.count + left, span->bias};
      if (keys.count >= most) return {most, keys.bias};
    }
    if (keys.bias != 0) return keys;  // that of the call's own keys is 0
    for (const int32_t* span = span_; span < end_ && keys.count < most; span += 2, done = 0)
      keys.count += span[1] - span[0] - done;
    return {keys.count < most ? keys.count : most, 0};
  }

  // The next keys, at most `most`; none at the end.
  KeyPlace next(int most) {
    for (; past_span_ < past_end_; ++past_span_, done_ = 0) {
      const int position = past_span_->start + done_, left = past_span_->end - position;
      if (left > 0) return take({past_span_, position, smallest(most, left, page_size_ - position % page_size_)});
    }
    for (; span_ < end_; span_ += 2, done_ = 0) {
      const int key = span_[0] + done_, left = span_[1] - key;
      if (left > 0) return take({nullptr, key, smallest(most, left, left)});
    }
    return {nullptr, 0, 0};
  }

  void skip(int64_t count) {
    for (; past_span_ < past_end_; ++past_span_, done_ = 0)
      if (!skip_within(past_span_->end - past_span_->start - done_, &count)) return;
    for (; span_ < end_; span_ += 2, done_ = 0)
      if (!skip_within(span_[1] - span_[0] - done_, &count)) return;
  }

 private:
  static int smallest(int a, int b, int c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }
  KeyPlace take(KeyPlace place) {
    done_ += place.count;
    return place;
  }
  // Whether all that is left of a span was skipped.
  bool skip_within(int left, int64_t* count) {
    if (*count < left) {
      done_ += static_cast<int>(*count);
      return false;
    }
    *count -= left;
    return true;
  }

  int page_size_;
  const PastSpan *past_span_ = nullptr, *past_end_ = nullptr;  // spans of the past still to walk over
  const int32_t *span_ = nullptr, *end_ = nullptr;             // spans of the call's own keys
  int done_ = 0;                                               // keys of the current span
};

// `count` things in as few tiles of at most `most` as possible, of nearly equal size: a multiple of kKeyMultiple.
SELFFORCING_INLINE int tile_size(int64_t count, int most) {
  const int64_t tiles = (count + most - 1) / most;
  return tiles == 0 ? 0 : round_up(static_cast<int>((count + tiles - 1) / tiles), kKeyMultiple);
}

// Of the past, over the K/V heads of all streams.
struct PastCounts {
  int64_t least = 0, most = 0, sum = 0;
};

inline PastCounts count_past(const AttentionParams& p) {
  PastCounts counts;
  for (int batch = 0; batch < p.batch; ++batch)
    for (int list = 0; list < p.past.span_lists; ++list) {
      const int64_t keys = num_past_keys(p.past, batch, list);
      counts.least = (batch == 0 && list == 0) || keys < counts.least ? keys : counts.least;
      counts.most = keys > counts.most ? keys : counts.most;
      counts.sum += keys * (p.num_kv_heads / p.past.span_lists);
    }
  return counts;
}

// The K/V heads of all streams, those with the longest past first, so that threads finish together; about equal ones
// as they come.
inline void order_by_past(const AttentionParams& p, int64_t most_keys, int32_t* order) {
  constexpr int kBuckets = 256;
  const int32_t heads = p.batch * p.num_kv_heads;
  const auto bucket = [&](int32_t head) {
    if (most_keys == 0) return int64_t{0};
    return (most_keys - num_past_keys(p.past, head / p.num_kv_heads, head % p.num_kv_heads)) * (kBuckets - 1) /
           most_keys;
  };
  int32_t next[kBuckets + 1] = {};  // place of each bucket's next head
  for (int32_t head = 0; head < heads; ++head) ++next[bucket(head) + 1];
  for (int i = 0; i < kBuckets; ++i) next[i + 1] += next[i];
  for (int32_t head = 0; head < heads; ++head) order[next[bucket(head)]++] = head;
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
