// What a CPU write is divided into: one item per side (keys or values), stream and page, so that threads never share
// one.
#pragma once
#include "params.h"

namespace selfforcing {

// Keys or values, where they come from and where they go.
struct WriteSide {
  const ConstHeads& from;
  void* pages;
  int64_t page_stride, token_stride, head_stride;
  uint16_t* scales;
  const float* offset;
};

// Tokens [begin, end) of a stream, whose first goes to `offset` in page `page`.
struct WriteRun {
  int64_t stream, begin, end, page, offset;
};

// The keys (0) or the values (1).
inline WriteSide write_side(const KVCacheWriteParams& p, int64_t side) {
  if (side == 0) return {p.k, p.k_pages, p.k_page_stride, p.k_token_stride, p.k_head_stride, p.k_scales, p.k_offset};
  return {p.v, p.v_pages, p.v_page_stride, p.v_token_stride, p.v_head_stride, p.v_scales, nullptr};
}

// Of tokens [first, end) of a stream, those in the page that is `index` pages after that of the first; empty beyond the
// last.
inline WriteRun write_run(const KVCacheWriteParams& p, int64_t stream, int64_t first, int64_t end, int64_t index) {
  const int64_t origin = p.write_start[stream], row = (origin + first) / p.page_size + index;
  const int64_t page_begin = row * p.page_size - origin, page_end = page_begin + p.page_size;
  const int64_t begin = page_begin > first ? page_begin : first;
  if (begin >= end) return {stream, end, end, 0, 0};
  return {stream, begin, page_end < end ? page_end : end, p.page_table[stream * p.table_stride + row],
          begin - page_begin};
}

// Calls write(WriteSide, WriteRun) for all of them, concurrently where it can.
template <typename Write>
void for_each_run(const KVCacheWriteParams& p, const Write& write) {
  // The first page may be entered in its middle, so the tokens touch up to one page more than they fill.
  const int64_t runs = (p.num_tokens + p.page_size - 1) / p.page_size + 1;
  p.parallel.for_each(2 * p.batch * runs, [&](int64_t item, int32_t) {
    const WriteRun run = write_run(p, item / runs % p.batch, 0, p.num_tokens, item % runs);
    if (run.begin < run.end) write(write_side(p, item / runs / p.batch), run);
  });
}

}  // namespace selfforcing
