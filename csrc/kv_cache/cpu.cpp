// Copies a block's keys and values into their pages: one item per stream and page, so that threads never share one.
#include <cstring>

#include "params.h"

namespace selfforcing {

namespace {

struct Side {
  const ConstHeads* from;
  char* pages;
  int64_t page_stride, token_stride, head_stride;
};

// Tokens [begin, end) of one stream, whose first goes to `offset` in page `page`.
void write_run(const KVCacheWriteParams& p, const Side& side, int64_t stream, int64_t begin, int64_t end, int64_t page,
               int64_t offset) {
  const int64_t element = p.element_size;
  const int64_t head_bytes = p.head_dim * element;
  const char* from = static_cast<const char*>(side.from->data) + stream * side.from->batch_stride * element;
  char* to = side.pages + (page * side.page_stride + offset * side.token_stride) * element;
  const int64_t token_elements = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  const bool one_head = p.num_kv_heads == 1;
  const bool heads_adjoin = one_head || (side.head_stride == p.head_dim && side.from->head_stride == p.head_dim);
  if (heads_adjoin && side.token_stride == token_elements && side.from->token_stride == token_elements) {
    std::memcpy(to, from + begin * token_elements * element, (end - begin) * token_elements * element);
    return;
  }
  for (int64_t token = begin; token < end; ++token) {
    const char* source = from + token * side.from->token_stride * element;
    char* target = to + (token - begin) * side.token_stride * element;
    if (heads_adjoin) {
      std::memcpy(target, source, token_elements * element);
      continue;
    }
    for (int64_t head = 0; head < p.num_kv_heads; ++head)
      std::memcpy(target + head * side.head_stride * element, source + head * side.from->head_stride * element,
                  head_bytes);
  }
}

}  // namespace

void kv_cache_write_cpu(const KVCacheWriteParams& p) {
  const Side sides[] = {
      {&p.k, static_cast<char*>(p.k_pages), p.k_page_stride, p.k_token_stride, p.k_head_stride},
      {&p.v, static_cast<char*>(p.v_pages), p.v_page_stride, p.v_token_stride, p.v_head_stride},
  };
  // The first page may be entered in its middle, so the tokens touch up to one page more than they fill.
  const int64_t runs = (p.num_tokens + p.page_size - 1) / p.page_size + 1;
  p.parallel.for_each(2 * p.batch * runs, [&](int64_t item, int32_t) {
    const int64_t run = item % runs, stream = item / runs % p.batch;
    const Side& side = sides[item / runs / p.batch];
    const int64_t start = p.write_start[stream];
    const int64_t row = start / p.page_size + run;
    const int64_t begin = row * p.page_size > start ? row * p.page_size : start;
    const int64_t next = (row + 1) * p.page_size;
    const int64_t end = next < start + p.num_tokens ? next : start + p.num_tokens;
    if (begin >= end) return;
    write_run(p, side, stream, begin - start, end - start, p.page_table[stream * p.table_stride + row],
              begin % p.page_size);
  });
}

}  // namespace selfforcing
