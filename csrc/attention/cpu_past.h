// Rows of cached keys and values as rows of q's dtype: decoded where pages are quantised, keys rotated where that is
// left to the reader. A few rows at a time, right before they are packed: no more of the cache is ever decoded.
#pragma once
#include "../simd/quantised.h"
#include "cpu_layout.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

inline constexpr int kDecodedRows = 16;  // at a time

// The cosines and sines that the key of one token is rotated by.
class Turn {
 public:
  Turn(const PagedPast& past, float* memory, int dim)
      : past_(past), cosines_(memory), sines_(memory + round_up(dim, kLanes)) {}

  static int64_t floats(int dim) { return 2 * round_up(dim, kLanes); }

  // Only what differs from the token before is gathered: mostly the column's pairs.
  SELFFORCING_INLINE void go_to(int32_t token) {
    const RopeAxes& axes = past_.rope_axes;
    const int32_t rows = token / axes.size[2];
    const int32_t position[3] = {rows / axes.size[1], rows % axes.size[1], token % axes.size[2]};
    int first = 0;
    for (int axis = 0; axis < 3; first += 2 * axes.pairs[axis++])
      if (position[axis] != position_[axis]) {
        gather(axis, position[axis], first);
        position_[axis] = position[axis];
      }
  }
  SELFFORCING_INLINE Floats rotate(Floats x, int64_t d) const {
    return multiply_add(x, load(cosines_ + d), swap_pairs(x) * load(sines_ + d));
  }
  SELFFORCING_INLINE Floats rotate_back(Floats x, int64_t d) const {
    return multiply_subtract(x, load(cosines_ + d), swap_pairs(x) * load(sines_ + d));
  }

 private:
  // Each cosine twice, each sine negative and positive, so that both channels of a pair find theirs.
  void gather(int axis, int32_t position, int first) {
    typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
    const Ints even = reinterpret_cast<Ints>(Pairs{} + 0xffffffffu);
    const int width = 2 * past_.rope_axes.pairs[axis], count = width < kLanes ? width : kLanes;
    const float* from = past_.rope_table + 2 * past_.rope_axes.table_offset(axis) + int64_t{position} * width;
    for (int i = 0; i < width; i += kLanes) {
      const int at = i + count <= width ? i : width - count;  // the last vector overlaps the one before
      const Floats both = load<Float32>(from + at, count), swapped = swap_pairs(both);
      store<Float32>(cosines_ + first + at, even ? both : swapped, count);
      store<Float32>(sines_ + first + at, even ? -swapped : both, count);
    }
  }

  const PagedPast& past_;
  float *cosines_, *sines_;  // [D], up to whole vectors
  int32_t position_[3] = {-1, -1, -1};
};

// ---- A row as it is stored: at(d, count) are its channels from d on

template <typename Element>
class ElementRow {
 public:
  static int64_t bytes(int dim) { return dim * sizeof(typename Element::Storage); }
  ElementRow(const void* row, const uint16_t*) : row_(static_cast<const typename Element::Storage*>(row)) {}
  SELFFORCING_INLINE Floats at(int64_t d, int count) const { return load<Element>(row_ + d, count); }

 private:
  const typename Element::Storage* row_;
};

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
  ScaledRow(const void* row, const uint16_t* scale)
      : row_(static_cast<const typename Stored::Storage*>(row)), scale_(from_bfloat16(*scale)) {}
  SELFFORCING_INLINE Floats at(int64_t d, int count) const { return load<Stored>(row_ + d, count) * scale_; }

 private:
  const typename Stored::Storage* row_;
  float scale_;
};

class Int4Row {
 public:
  static int64_t bytes(int dim) { return dim / 2; }
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
  void* rows;  // keys and values of two runs: a word may hold the last row of one and the first of the next
  float* turn;
};

template <typename Op>
PastBuffers take_past_buffers(Arena& arena, int dim) {
  PastBuffers to;
  to.rows = arena.take<typename Op::Storage>(int64_t{4} * kDecodedRows * dim);
  to.turn = arena.take<float>(Turn::floats(dim));
  return to;
}

// Keys and values of the past of one K/V head.
template <typename Op>
class PastRows {
 public:
  using Storage = typename Op::Storage;

  PastRows(const AttentionParams& p, int batch, int kv_head, const PastBuffers& buffers)
      : p_(p),
        batch_(batch),
        kv_head_(kv_head),
        rows_(static_cast<Storage*>(buffers.rows)),
        turn_(p.past, buffers.turn, p.head_dim) {}

  // How many may be read at a time.
  int most() const { return decoded() || rotated() ? kDecodedRows : 1 << 30; }

  // They stay until two runs later.
  KeyRun<Op> read(const KeyPlace& place) {
    const PagedPast& past = p_.past;
    const int slot = place.first % past.page_size;
    const int64_t page = past.page_table[batch_ * past.table_stride + place.first / past.page_size];
    const int64_t size = decoded() ? 1 : sizeof(Storage), token = page * past.page_size + slot;
    const char* k = static_cast<const char*>(past.k_pages) +
                    (page * past.k_page_stride + slot * past.k_token_stride + kv_head_ * past.k_head_stride) * size;
    const char* v = static_cast<const char*>(past.v_pages) +
                    (page * past.v_page_stride + slot * past.v_token_stride + kv_head_ * past.v_head_stride) * size;
    KeyRun<Op> run{reinterpret_cast<Row<Op>>(k), reinterpret_cast<Row<Op>>(v), past.k_token_stride, past.v_token_stride,
                   place.count};
    if (!decoded() && !rotated()) return run;
    Storage* to = rows_ + (second_ ? 2 * kDecodedRows * p_.head_dim : 0);
    second_ = !second_;
    const float* offset = past.k_offset == nullptr ? nullptr : past.k_offset + int64_t{kv_head_} * p_.head_dim;
    const int32_t first_token = place.past->token + place.first - place.past->start;
    decode({k, past.k_token_stride * size, past.k_scales, token, place.count}, to, offset, rotated() ? &turn_ : nullptr,
           first_token);
    run.k = to;
    run.k_stride = p_.head_dim;
    if (!decoded()) return run;
    to += kDecodedRows * p_.head_dim;
    decode({v, past.v_token_stride, past.v_scales, token, place.count}, to, nullptr, nullptr, 0);
    run.v = to;
    run.v_stride = p_.head_dim;
    return run;
  }

  // For the gradients of keys as they are stored.
  Turn& turn() { return turn_; }

 private:
  struct Stored {
    const char* rows;
    int64_t stride;  // in bytes
    const uint16_t* scales;
    int64_t token;  // of the pool, the first
    int count;
  };

  bool decoded() const { return p_.past.format != PageFormat::elements; }
  bool rotated() const { return p_.past.rope_table != nullptr; }

  void decode(const Stored& from, Storage* to, const float* offset, Turn* turn, int32_t first_token) {
    switch (p_.past.format) {
      case PageFormat::elements: return decode<ElementRow<typename Op::Element>>(from, to, offset, turn, first_token);
      case PageFormat::int8: return decode<ScaledRow<Int8>>(from, to, offset, turn, first_token);
      case PageFormat::fp8_e4m3: return decode<ScaledRow<Float8E4M3>>(from, to, offset, turn, first_token);
      case PageFormat::int4: return decode<Int4Row>(from, to, offset, turn, first_token);
    }
  }

  template <typename StoredRow>
  void decode(const Stored& from, Storage* to, const float* offset, Turn* turn, int32_t first_token) {
    const int dim = p_.head_dim;
    const int64_t groups = p_.past.format == PageFormat::int4 ? dim / kInt4Group : 1;
    for (int i = 0; i < from.count; ++i, to += dim) {
      prefetch_row(from.rows + (i + kPrefetchRows) * from.stride, StoredRow::bytes(dim));
      const int64_t scale = ((from.token + i) * p_.num_kv_heads + kv_head_) * groups;
      const StoredRow row(from.rows + i * from.stride, from.scales == nullptr ? nullptr : from.scales + scale);
      if (turn != nullptr) turn->go_to(first_token + i);
      for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
        Floats x = row.at(d, count);
        if (offset != nullptr) x += load<Float32>(offset + d, count);
        if (turn != nullptr) x = turn->rotate(x, d);
        store<typename Op::Element>(to + d, x, count);
      });
    }
  }

  const AttentionParams& p_;
  int batch_, kv_head_;
  Storage* rows_;
  bool second_ = false;
  Turn turn_;
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
    if (place.past != nullptr) return past_.read(place);
    return {row_of<Op>(p_.k, batch_, kv_head_, place.first), row_of<Op>(p_.v, batch_, kv_head_, place.first),
            p_.k.token_stride, p_.v.token_stride, place.count};
  }

  PastRows<Op>& past() { return past_; }

 private:
  const AttentionParams& p_;
  int batch_, kv_head_;
  PastRows<Op> past_;
};

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
