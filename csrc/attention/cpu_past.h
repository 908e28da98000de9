// Rows of cached keys and values as rows of q's dtype: decoded where pages are quantised, keys rotated where that is
// left to the reader. A few rows at a time, right before they are packed: no more of the cache is ever decoded.
#pragma once
#include "../simd/quantised.h"
#include "cpu_layout.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

inline constexpr int kDecodedRows = 16;  // at a time

// Calls visit(d, turns, count) for the channels of a head, `count` from d on: pairs of cosine and sine that the key of
// a token is rotated by. No run of channels belongs to two axes.
template <typename Visit>
SELFFORCING_INLINE void for_turns(const PagedPast& past, int32_t token, const Visit& visit) {
  const RopeAxes& axes = past.rope_axes;
  const int32_t rows = token / axes.size[2];
  const int32_t position[3] = {rows / axes.size[1], rows % axes.size[1], token % axes.size[2]};
  const float* table = past.rope_table;
  int64_t first = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t width = 2 * axes.pairs[axis];
    const float* turns = table + position[axis] * width;
    for_lanes(width, [&](int64_t i, int count)
                         __attribute__((always_inline)) { visit(first + i, load<Float32>(turns + i, count), count); });
    first += width;
    table += axes.size[axis] * width;
  }
}

// ---- A row as it is stored: at(d, count) are its channels from d on

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

// One scale for all channels.
template <typename Stored>
class ScaledRow {
 public:
  static int64_t bytes(int dim) { return dim; }
  static int64_t scales(int) { return 1; }
  ScaledRow(const void* row, const uint16_t* scale)
      : row_(static_cast<const typename Stored::Storage*>(row)), scale_(from_bfloat16(*scale) * Stored::kUnit) {}
  SELFFORCING_INLINE Floats at(int64_t d, int count) const { return load<Stored>(row_ + d, count) * scale_; }

 private:
  const typename Stored::Storage* row_;
  float scale_;
};

class Int4Row {
 public:
  static int64_t bytes(int dim) { return dim / 2; }
  static int64_t scales(int dim) { return dim / kInt4Group; }
  Int4Row(const void* row, const uint16_t* scales) : row_(static_cast<const uint8_t*>(row)), scales_(scales) {}
  SELFFORCING_INLINE Floats at(int64_t d, int) const {
    return widen_int4(row_, d) * from_bfloat16(scales_[d / kInt4Group]);
  }

 private:
  const uint8_t* row_;
  const uint16_t* scales_;
};

// ---- Rows of q's dtype

// Memory of a worker.
struct PastBuffers {
  void* rows;      // keys and values of two runs: a word may hold the last row of one and the first of the next
  float* decoded;  // keys that are still to be rotated
};

template <typename Op>
PastBuffers take_past_buffers(Arena& arena, int dim) {
  PastBuffers to;
  to.rows = arena.take<typename Op::Storage>(int64_t{4} * kDecodedRows * dim);
  to.decoded = arena.take<float>(int64_t{kDecodedRows} * dim);
  return to;
}

// Keys and values of the past of one K/V head.
template <typename Op>
class PastRows {
 public:
  using Element = typename Op::Element;
  using Storage = typename Op::Storage;

  PastRows(const AttentionParams& p, int batch, int kv_head, const PastBuffers& buffers)
      : p_(p), batch_(batch), kv_head_(kv_head), buffers_(buffers) {}

  // How many may be read at a time.
  int most() const { return decoded() || rotated() ? kDecodedRows : 1 << 30; }

  // They stay until two runs later. `ahead`: what will be read next, if it is of the past.
  KeyRun<Op> read(const KeyPlace& place, const KeyPlace& ahead) {
    const PagedPast& past = p_.past;
    const Place from = find(place);
    const int count = place.count, dim = p_.head_dim;
    KeyRun<Op> run{reinterpret_cast<Row<Op>>(from.k), reinterpret_cast<Row<Op>>(from.v), past.k_token_stride,
                   past.v_token_stride, count};
    if (!decoded() && !rotated()) return run;
    const Place next = ahead.past == nullptr ? from : find(ahead);
    Storage* to = static_cast<Storage*>(buffers_.rows) + (second_ ? 2 * kDecodedRows * dim : 0);
    second_ = !second_;
    const int32_t token = place.past->token + place.first - place.past->start;
    if (decoded()) {
      const float* offset = past.k_offset == nullptr ? nullptr : past.k_offset + int64_t{kv_head_} * dim;
      const Quantised k{from.k, next.k, past.k_token_stride, past.k_scales, from.row, count};
      if (rotated()) {
        decode<Float32>(k, offset, buffers_.decoded);
        rotate<Float32>(buffers_.decoded, nullptr, dim, count, token, to);
      } else {
        decode<Element>(k, offset, to);
      }
      run.v = to + kDecodedRows * dim;
      run.v_stride = dim;
      decode<Element>({from.v, next.v, past.v_token_stride, past.v_scales, from.row, count}, nullptr,
                      to + kDecodedRows * dim);
    } else {
      rotate<Element>(run.k, reinterpret_cast<Row<Op>>(next.k), run.k_stride, count, token, to);
      for (int i = 0; i < count; ++i)
        prefetch_row(next.v + i * run.v_stride * static_cast<int64_t>(sizeof(Storage)), dim * sizeof(Storage));
    }
    run.k = to;
    run.k_stride = dim;
    return run;
  }

 private:
  // Of the first of neighbouring keys: where it and its value start, and its row of the scales.
  struct Place {
    const char *k, *v;
    int64_t row;
  };

  struct Quantised {
    const char *rows, *ahead;
    int64_t stride;
    const uint16_t* scales;
    int64_t first;  // row of the scales; neighbouring tokens are num_kv_heads rows apart
    int count;
  };

  bool decoded() const { return p_.past.format != PageFormat::elements; }
  bool rotated() const { return p_.past.rope_table != nullptr; }

  Place find(const KeyPlace& place) const {
    const PagedPast& past = p_.past;
    const int slot = place.first % past.page_size;
    const int64_t page = past.page_table[batch_ * past.table_stride + place.first / past.page_size];
    const int64_t size = decoded() ? 1 : sizeof(Storage);
    const auto at = [&](const void* pages, int64_t page_stride, int64_t token_stride, int64_t head_stride) {
      return static_cast<const char*>(pages) +
             (page * page_stride + slot * token_stride + kv_head_ * head_stride) * size;
    };
    return {at(past.k_pages, past.k_page_stride, past.k_token_stride, past.k_head_stride),
            at(past.v_pages, past.v_page_stride, past.v_token_stride, past.v_head_stride),
            (page * past.page_size + slot) * p_.num_kv_heads + kv_head_};
  }

  template <typename To>
  void decode(const Quantised& from, const float* offset, typename To::Storage* to) {
    switch (p_.past.format) {
      case PageFormat::elements: return;  // nothing to decode
      case PageFormat::int8: return decode_rows<ScaledRow<Int8>, To>(from, offset, to);
      case PageFormat::fp8_e4m3: return decode_rows<ScaledRow<Float8E4M3>, To>(from, offset, to);
      case PageFormat::int4: return decode_rows<Int4Row, To>(from, offset, to);
    }
  }

  template <typename StoredRow, typename To>
  void decode_rows(const Quantised& from, const float* offset, typename To::Storage* to) {
    const int dim = p_.head_dim;
    for (int i = 0; i < from.count; ++i, to += dim) {
      prefetch_row(from.ahead + i * from.stride, StoredRow::bytes(dim));
      const StoredRow row(from.rows + i * from.stride,
                          from.scales + (from.first + int64_t{i} * p_.num_kv_heads) * StoredRow::scales(dim));
      for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
        Floats x = row.at(d, count);
        if (offset != nullptr) x += load<Float32>(offset + d, count);
        store<To>(to + d, x, count);
      });
    }
  }

  template <typename From>
  void rotate(const typename From::Storage* rows, const typename From::Storage* ahead, int64_t stride, int count,
              int32_t first_token, Storage* to) {
    const int dim = p_.head_dim;
    for (int i = 0; i < count; ++i, rows += stride, to += dim) {
      if (ahead != nullptr) prefetch_row(ahead + i * stride, dim * sizeof(*rows));
      // Whole vectors: what is too much is overwritten, by the next axis, row or run.
      for_turns(p_.past, first_token + i, [&](int64_t d, Floats turns, int lanes) __attribute__((always_inline)) {
        Element::narrow(to + d, rotate_pairs(load<From>(rows + d, lanes), turns));
      });
    }
  }

  const AttentionParams& p_;
  int batch_, kv_head_;
  PastBuffers buffers_;
  bool second_ = false;  // which half of the rows is next
};

// The keys and values that a block sees.
template <typename Op>
class VisibleKeys : public KeyWalk {
 public:
  VisibleKeys(const AttentionParams& p, int batch, int kv_head, int block, const PastBuffers& buffers)
      : KeyWalk(p, batch, kv_head, block), p_(p), batch_(batch), kv_head_(kv_head), past_(p, batch, kv_head, buffers) {}

  // The next run, of at most `most` keys.
  KeyRun<Op> next_run(int most) {
    const KeyPlace place = next(most < past_.most() ? most : past_.most());
    if (place.past != nullptr) {
      KeyWalk ahead = *this;
      return past_.read(place, ahead.next(1));
    }
    return {row_of<Op>(p_.k, batch_, kv_head_, place.first), row_of<Op>(p_.v, batch_, kv_head_, place.first),
            p_.k.token_stride, p_.v.token_stride, place.count};
  }

 private:
  const AttentionParams& p_;
  int batch_, kv_head_;
  PastRows<Op> past_;
};

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
