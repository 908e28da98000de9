// Cached keys and values on their way into a packed tile: decoded where pages are quantised, keys rotated where that is
// left to the reader. What is decoded is packed at once: no copy of the cache is ever made.
#pragma once
#include "../simd/quantised.h"
#include "cpu_layout.h"

namespace selfforcing {
namespace SELFFORCING_ISA {

// ---- Rotations

// The pairs of cosine and sine that keys are rotated by, token after token. The table that it reads has them as rows
// [frame][channel of the frame axis], then, side by side for every place in a frame, those of its row and column:
// [row][column][channel].
class Turns {
 public:
  // Of all rows, and a vector at both ends: whole vectors are read.
  static int64_t table_floats(const PagedPast& past) {
    if (past.rope_table == nullptr) return 0;
    const Widths width(past.rope_axes);
    return 2 * kLanes + past.rope_axes.size[0] * width.frame + width.places * width.place();
  }

  static void fill_table(const PagedPast& past, float* to) {
    if (past.rope_table == nullptr) return;
    const RopeAxes& axes = past.rope_axes;
    const Widths width(axes);
    const float *rows = past.rope_table + 2 * axes.table_offset(1),
                *columns = past.rope_table + 2 * axes.table_offset(2);
    const auto append = [&](const float* from, int64_t floats) {
      memcpy(to, from, floats * sizeof(float));
      to += floats;
    };
    memset(to, 0, kLanes * sizeof(float));
    to += kLanes;
    append(past.rope_table, axes.size[0] * width.frame);
    for (int row = 0; row < axes.size[1]; ++row)
      for (int column = 0; column < axes.size[2]; ++column) {
        append(rows + row * width.row, width.row);
        append(columns + column * width.column, width.column);
      }
    memset(to, 0, kLanes * sizeof(float));
  }

  Turns(const PagedPast& past, const float* table, int32_t token) : width_(past.rope_axes) {
    place_ = static_cast<int32_t>(token % width_.places);
    frame_ = table + kLanes + token / width_.places * width_.frame;
    places_ = table + kLanes + past.rope_axes.size[0] * width_.frame;
    for (int lane = 0; lane < kLanes; ++lane) of_frame_[lane] = lane < width_.frame % kLanes ? -1 : 0;
  }

  void next() {
    if (++place_ < width_.places) return;
    place_ = 0;
    frame_ += width_.frame;
  }

  // Calls visit(d, turns, count) for the channels of a head, `count` from d on.
  template <typename Visit>
  SELFFORCING_INLINE void for_channels(int dim, const Visit& visit) const {
    const int64_t width = 2 * RopeAxes(0, 0, 0, dim).pairs[0];  // of the frame axis
    const float *frame = frame_, *place = places_ + place_ * (dim - width) - width;
    for_lanes(dim, [&](int64_t d, int count) __attribute__((always_inline)) {
      Floats turns;
      if (d + kLanes <= width)
        turns = load(frame + d);
      else if (d >= width)
        turns = load(place + d);
      else
        turns = of_frame_ ? load(frame + d) : load(place + d);
      visit(d, turns, count);
    });
  }

 private:
  struct Widths {
    explicit Widths(const RopeAxes& axes)
        : frame(2 * axes.pairs[0]),
          row(2 * axes.pairs[1]),
          column(2 * axes.pairs[2]),
          places(int64_t{axes.size[1]} * axes.size[2]) {}
    int64_t place() const { return row + column; }
    int64_t frame, row, column;  // channels of each axis
    int64_t places;              // in a frame
  };

  const Widths width_;
  int64_t place_;
  const float *frame_, *places_;
  Ints of_frame_{};  // the lanes of the frame axis in the vector that both share
};

// ---- A row as it is stored: at(d, count) are its channels from d on

template <typename Element>
class PlainRow {
 public:
  static int64_t bytes(int dim) { return dim * sizeof(typename Element::Storage); }
  static int64_t scales(int) { return 0; }
  PlainRow(const void* row, const uint16_t*) : row_(static_cast<const typename Element::Storage*>(row)) {}
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

// ---- Runs of rows

template <typename StoredRow>
struct RowType {
  using Row = StoredRow;
};

// Calls call(RowType) with the type of a row of pages.
template <typename Element, typename Call>
void with_row_type(PageFormat format, const Call& call) {
  switch (format) {
    case PageFormat::elements: return call(RowType<PlainRow<Element>>{});
    case PageFormat::int8: return call(RowType<ScaledRow<Int8>>{});
    case PageFormat::fp8_e4m3: return call(RowType<ScaledRow<Float8E4M3>>{});
    case PageFormat::int4: return call(RowType<Int4Row>{});
  }
}

// Neighbouring rows of one head in a page.
struct StoredRows {
  const char *rows, *ahead;  // and those that will be read next
  int64_t stride;            // bytes
  const uint16_t* scales;
  int64_t scales_stride;
  int count;

  // A row; asks for one that is read some rows later.
  template <typename Row>
  SELFFORCING_INLINE Row row(int i, int dim) const {
    const int later = i + kPrefetchRows;
    prefetch_row(later < count ? rows + later * stride : ahead + (later - count) * stride, Row::bytes(dim));
    return Row(rows + i * stride, scales + i * scales_stride);
  }
};

// Calls call(IntConstant) with a common head dim as a compile-time constant: then the loops over channels are unrolled,
// and what a row takes besides is about halved. 0: any other.
template <typename Call>
void with_dim(int dim, const Call& call) {
  switch (dim) {
    case 32: return call(IntConstant<32>{});
    case 64: return call(IntConstant<64>{});
    case 128: return call(IntConstant<128>{});
    default: return call(IntConstant<0>{});
  }
}

// Packs them as rows from `first` on. `offset`: nullptr, or what is added to every row. kDim: see with_dim.
template <typename Op, typename StoredRow, int kDim>
void pack_stored(StoredRows from, const float* offset, int first, PackedRows<Op> to) {
  if constexpr (kDim != 0) to.dim = kDim;
  const auto at = [&](const StoredRow& row, int64_t d, int lanes) __attribute__((always_inline)) {
    const Floats x = row.at(d, lanes);
    return offset == nullptr ? x : x + load<Float32>(offset + d, lanes);
  };
  const auto put = [&](int i) __attribute__((always_inline)) {
    const StoredRow row = from.row<StoredRow>(i, to.dim);
    const auto place = to.place(first + i);
    for_lanes(to.dim, [&](int64_t d, int lanes) __attribute__((always_inline)) { place.put(d, at(row, d, lanes)); });
  };
  const auto join = [&](int i) __attribute__((always_inline)) {
    const StoredRow row = from.row<StoredRow>(i, to.dim);
    const StoredRow last = Op::kPack == 1 ? row : from.row<StoredRow>(i + Op::kPack - 1, to.dim);
    float* joined = to.joined_at(first + i);
    for_lanes(to.dim, [&](int64_t d, int lanes) __attribute__((always_inline)) {
      Floats x[Op::kPack] = {Op::rounded(at(row, d, lanes))};
      if constexpr (Op::kPack == 2) x[1] = Op::rounded(at(last, d, lanes));
      store(joined + d * to.joined_channel, Op::join(x));
    });
  };
  if (to.rows == nullptr) return for_words<Op>(first, from.count, join, put);
  for (int i = 0; i < from.count; ++i) put(i);
}

// The same, each row rotated: `turns` are those of the first.
template <typename Op, typename StoredRow, int kDim>
void pack_rotated(StoredRows from, const float* offset, Turns turns, int first, PackedRows<Op> to) {
  if constexpr (kDim != 0) to.dim = kDim;
  for (int i = 0; i < from.count; ++i, turns.next()) {
    const StoredRow row = from.row<StoredRow>(i, to.dim);
    const auto place = to.place(first + i);
    turns.for_channels(to.dim, [&](int64_t d, Floats pairs, int lanes) __attribute__((always_inline)) {
      Floats x = row.at(d, lanes);
      if (offset != nullptr) x += load<Float32>(offset + d, lanes);
      place.put(d, rotate_pairs(x, pairs));
    });
  }
}

// The keys and values that a block sees, on their way into a packed tile.
template <typename Op>
class VisibleKeys : public KeyWalk {
 public:
  // `turns`: the table of Turns.
  VisibleKeys(const AttentionParams& p, int batch, int kv_head, int block, const float* turns)
      : KeyWalk(p, batch, kv_head, block), p_(p), batch_(batch), kv_head_(kv_head), turns_(turns) {}

  // Packs some of the next keys and values, at most `most`, as rows from `first` on. Returns how many.
  int pack_some(int first, int most, const PackedRows<Op>& keys, const PackedRows<Op>& values) {
    const KeyPlace place = next(most);
    if (place.past != nullptr) {
      KeyWalk rest = *this;
      pack_past(place, rest.next(1), first, keys, values);
    } else {
      pack_rows<Op>(row_of<Op>(p_.k, batch_, kv_head_, place.first), p_.k.token_stride, place.count, first, keys);
      pack_rows<Op>(row_of<Op>(p_.v, batch_, kv_head_, place.first), p_.v.token_stride, place.count, first, values);
    }
    return place.count;
  }

 private:
  void pack_past(const KeyPlace& place, const KeyPlace& next, int first, const PackedRows<Op>& keys,
                 const PackedRows<Op>& values) const {
    const PagedPast& past = p_.past;
    const StoredRows k =
        stored(place, next, past.k_pages, past.k_page_stride, past.k_token_stride, past.k_head_stride, past.k_scales);
    const StoredRows v =
        stored(place, next, past.v_pages, past.v_page_stride, past.v_token_stride, past.v_head_stride, past.v_scales);
    const bool plain = past.format == PageFormat::elements, rotated = past.rope_table != nullptr;
    if (plain && !rotated)
      pack_rows<Op>(reinterpret_cast<Row<Op>>(k.rows), past.k_token_stride, place.count, first, keys);
    if (plain) pack_rows<Op>(reinterpret_cast<Row<Op>>(v.rows), past.v_token_stride, place.count, first, values);
    if (plain && !rotated) return;
    const float* offset = past.k_offset == nullptr ? nullptr : past.k_offset + int64_t{kv_head_} * p_.head_dim;
    with_row_type<typename Op::Element>(past.format, [&](auto type) {
      using StoredRow = typename decltype(type)::Row;
      with_dim(p_.head_dim, [&](auto dim) {
        constexpr int kDim = decltype(dim)::kValue;
        if (rotated)
          pack_rotated<Op, StoredRow, kDim>(k, offset, Turns(past, turns_, token_of(place)), first, keys);
        else
          pack_stored<Op, StoredRow, kDim>(k, offset, first, keys);
        if (!plain) pack_stored<Op, StoredRow, kDim>(v, nullptr, first, values);
      });
    });
  }

  StoredRows stored(const KeyPlace& place, const KeyPlace& next, const void* pages, int64_t page_stride,
                    int64_t token_stride, int64_t head_stride, const uint16_t* scales) const {
    const PagedPast& past = p_.past;
    const int64_t size = past.format == PageFormat::elements ? sizeof(typename Op::Storage) : 1;
    const int64_t row_scales = past.format == PageFormat::int4 ? p_.head_dim / kInt4Group : 1;
    const auto page_of = [&](int position) {
      return int64_t{past.page_table[batch_ * past.table_stride + position / past.page_size]};
    };
    const auto row_at = [&](int position) {
      const int64_t offset =
          page_of(position) * page_stride + position % past.page_size * token_stride + kv_head_ * head_stride;
      return static_cast<const char*>(pages) + offset * size;
    };
    StoredRows from{row_at(place.first),          nullptr,    token_stride * size, nullptr,
                    p_.num_kv_heads * row_scales, place.count};
    from.ahead = next.past == nullptr ? from.rows : row_at(next.first);
    if (scales != nullptr)
      from.scales = scales + ((page_of(place.first) * past.page_size + place.first % past.page_size) * p_.num_kv_heads +
                              kv_head_) *
                                 row_scales;
    return from;
  }

  const AttentionParams& p_;
  int batch_, kv_head_;
  const float* turns_;
};

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
