// Cache writes for the tests of every kernel: every token lands in its page, nothing else changes, aligned or not.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

#include "../kv_cache/params.h"
#include "elements.h"

namespace selfforcing::kv_cache_test {

using Kernel = void (*)(const KVCacheWriteParams&);

struct Case {
  int element_size, batch, num_tokens, num_heads, head_dim, page_size;
  int gap;     // elements between rows: 0 keeps them aligned to 16 bytes
  int offset;  // elements in front of each tensor
  std::vector<int32_t> write_start;
};

// `bytes` that say where they stand.
inline std::vector<unsigned char> numbered(size_t bytes, unsigned salt) {
  std::vector<unsigned char> memory(bytes);
  uint32_t state = salt;
  for (unsigned char& byte : memory) byte = static_cast<unsigned char>((state = state * 1664525u + 1013904223u) >> 24);
  return memory;
}

inline bool write_is_right(const Case& c, Kernel kernel, const Parallel& parallel) {
  int32_t last = 0;
  for (int32_t start : c.write_start) last = start > last ? start : last;
  const int pages_per_stream = (last + c.num_tokens + c.page_size - 1) / c.page_size + 1;
  const int num_pages = c.batch * pages_per_stream;
  const int64_t row = c.head_dim + c.gap, token = c.num_heads * row, size = c.element_size;

  KVCacheWriteParams p;
  p.element_size = c.element_size, p.batch = c.batch, p.num_tokens = c.num_tokens, p.num_kv_heads = c.num_heads;
  p.head_dim = c.head_dim, p.page_size = c.page_size;
  const std::vector<unsigned char> k = numbered((c.offset + c.batch * c.num_tokens * token) * size, 1);
  const std::vector<unsigned char> v = numbered(k.size(), 2);
  std::vector<unsigned char> k_pages = numbered((c.offset + num_pages * c.page_size * token) * size, 3);
  std::vector<unsigned char> v_pages = numbered(k_pages.size(), 4);
  p.k = {k.data() + c.offset * size, c.num_tokens * token, token, row};
  p.v = {v.data() + c.offset * size, c.num_tokens * token, token, row};
  p.k_pages = k_pages.data() + c.offset * size, p.v_pages = v_pages.data() + c.offset * size;
  p.k_page_stride = p.v_page_stride = c.page_size * token;
  p.k_token_stride = p.v_token_stride = token;
  p.k_head_stride = p.v_head_stride = row;
  std::vector<int32_t> page_table(num_pages);
  for (int i = 0; i < num_pages; ++i) page_table[i] = num_pages - 1 - i;  // backwards: no page is where one would guess
  p.page_table = page_table.data(), p.table_stride = pages_per_stream;
  p.write_start = c.write_start.data();

  std::vector<unsigned char> expected_k = k_pages, expected_v = v_pages;
  for (int b = 0; b < c.batch; ++b)
    for (int i = 0; i < c.num_tokens; ++i)
      for (int h = 0; h < c.num_heads; ++h) {
        const int position = c.write_start[b] + i;
        const int64_t page = page_table[b * pages_per_stream + position / c.page_size];
        const int64_t from = (c.offset + b * c.num_tokens * token + i * token + h * row) * size;
        const int64_t to = (c.offset + (page * c.page_size + position % c.page_size) * token + h * row) * size;
        std::memcpy(&expected_k[to], &k[from], c.head_dim * size);
        std::memcpy(&expected_v[to], &v[from], c.head_dim * size);
      }
  p.parallel = parallel;
  kernel(p);
  return k_pages == expected_k && v_pages == expected_v;
}

// Checks every case on each of `thread_counts` threads; whether all passed.
inline bool check_all(Kernel kernel, const std::vector<int>& thread_counts) {
  const Case cases[] = {
      {2, 1, 12, 2, 64, 4, 0, 0, {0}},     {4, 2, 7, 3, 40, 5, 0, 0, {3, 11}},    {2, 2, 9, 1, 8, 16, 3, 0, {0, 40}},
      {4, 1, 5, 2, 24, 2, 0, 1, {6}},      {2, 3, 1, 2, 128, 1, 8, 0, {0, 1, 2}}, {2, 1, 6, 2, 16, 3, 0, 5, {2}},
      {4, 2, 300, 4, 8, 50, 0, 0, {7, 0}}, {2, 2, 0, 2, 64, 4, 0, 0, {0, 0}},
  };
  int passed = 0, failed = 0;
  for (const Case& c : cases)
    for (int num_threads : thread_counts) {
      bool right = false;
      try {
        right = write_is_right(c, kernel, {num_threads, kernel_test::run_on_threads});
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
      }
      right ? ++passed : ++failed;
      if (!right) std::printf("FAILED  case %d, %d threads\n", static_cast<int>(&c - cases), num_threads);
    }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0;
}

}  // namespace selfforcing::kv_cache_test
