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

// Calls write(WriteSide, WriteRun) for all of them, concurrently where it can.
template <typename Write>
void for_each_run(const KVCacheWriteParams& p, const Write& write) {
  // The first page may be entered in its middle, so the tokens touch up to one page more than they fill.
  const int64_t runs = (p.num_tokens + p.page_size - 1) / p.page_size + 1;
  p.parallel.for_each(2 * p.batch * runs, [&](int64_t item, int32_t) {
    const WriteSide sides[] = {
        {p.k, p.k_pages, p.k_page_stride, p.k_token_stride, p.k_head_stride, p.k_scales, p.k_offset},
        {p.v, p.v_pages, p.v_page_stride, p.v_token_stride, p.v_head_stride, p.v_scales, nullptr},
    };
    const int64_t run = item % runs, stream = item / runs % p.batch;
    const int64_t start = p.write_start[stream];
    const int64_t row = start / p.page_size + run;
    const int64_t begin = row * p.page_size > start ? row * p.page_size : start;
    const int64_t next = (row + 1) * p.page_size;
    const int64_t end = next < start + p.num_tokens ? next : start + p.num_tokens;
    if (begin >= end) return;
    write(sides[item / runs / p.batch], WriteRun{stream, begin - start, end - start,
                                                 p.page_table[stream * p.table_stride + row], begin % p.page_size});
  });
}

}  // namespace selfforcing
