// Cache writes for the tests of every kernel: every token lands in its page, nothing else changes, aligned or not. What
// quantised pages must hold is computed here in the slowest way, and kernels give the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
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

// ---- Quantised pages

inline const char* format_name(PageFormat format) {
  constexpr const char* kNames[] = {"elements", "int8", "fp8_e4m3", "int4"};
  return kNames[static_cast<int>(format)];
}

struct QuantisedCase {
  PageFormat format;
  DType dtype;
  int batch, num_tokens, num_heads, head_dim, page_size;
  bool with_offset;
  int gap;     // elements between the rows of k and v, bytes between those of pages
  int offset;  // elements, and bytes, in front of each
  std::vector<int32_t> write_start;

  int groups() const { return format == PageFormat::int4 ? head_dim / kInt4Group : 1; }
  int row_bytes() const { return format == PageFormat::int4 ? head_dim / 2 : head_dim; }
};

inline float bfloat16(uint16_t bits) { return kernel_test::to_float(DType::bfloat16, &bits, 0); }

// The value of an fp8 number, e4m3fn: its largest is 448, and 0x7f is NaN.
inline float fp8_value(uint8_t bits) {
  const int exponent = (bits >> 3) & 15, fraction = bits & 7;
  const double magnitude = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
  return static_cast<float>(bits & 0x80 ? -magnitude : magnitude);
}

// The nearest fp8 number, of two equally near ones the even one: looked for among all.
inline uint8_t nearest_fp8(float x) {
  uint8_t nearest = 0;
  for (uint8_t bits = 0; bits < 0x7f; ++bits) {
    const double distance = std::fabs(static_cast<double>(fp8_value(bits)) - std::fabs(x));
    const double best = std::fabs(static_cast<double>(fp8_value(nearest)) - std::fabs(x));
    if (distance < best || (distance == best && bits % 2 == 0)) nearest = bits;
  }
  return std::signbit(x) ? nearest | 0x80 : nearest;
}

// The least bfloat16 number that is not below amax / largest; 0 where that would not be a normal number, NaN where amax
// is not finite.
inline uint16_t exact_scale(float amax, float largest) {
  if (!std::isfinite(amax)) return 0x7fc0;
  const float quotient = amax / largest;
  if (quotient < 0x1p-126f) return 0;
  uint32_t wide;
  std::memcpy(&wide, &quotient, sizeof(wide));
  uint16_t bits = static_cast<uint16_t>(wide >> 16);
  while (bfloat16(bits) < quotient) ++bits;
  return bits;
}

// What must be written for the channels x - offset of one token and head.
inline void quantise_exactly(PageFormat format, const std::vector<float>& shifted, uint8_t* to, uint16_t* scales) {
  const int dim = static_cast<int>(shifted.size()), group = format == PageFormat::int4 ? kInt4Group : dim;
  const float largest = format == PageFormat::int8 ? 127 : format == PageFormat::int4 ? 7 : 448;
  for (int first = 0; first < dim; first += group) {
    float amax = 0;
    for (int c = first; c < first + group; ++c)
      if (!(std::fabs(shifted[c]) <= amax)) amax = std::isnan(amax) ? amax : std::fabs(shifted[c]);
    const uint16_t bits = scales[first / group] = exact_scale(amax, largest);
    const float scale = bfloat16(bits);
    const auto element = [&](int c) { return scale > 0 ? shifted[c] / scale : 0.0f; };
    for (int c = first; c < first + group; ++c) {
      if (format == PageFormat::int8) to[c] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(element(c))));
      if (format == PageFormat::fp8_e4m3) to[c] = nearest_fp8(element(c));
    }
    for (int j = 0; format == PageFormat::int4 && j < kInt4Group / 2; ++j) {
      const int low = static_cast<int>(std::nearbyint(element(first + j))) + 8;
      const int high = static_cast<int>(std::nearbyint(element(first + j + kInt4Group / 2))) + 8;
      to[first / 2 + j] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

// Random numbers of sizes that differ from token to token, among them 0, infinity, NaN and numbers that are too small.
inline std::vector<unsigned char> random_tokens(const QuantisedCase& c, unsigned seed) {
  const int64_t rows = static_cast<int64_t>(c.batch) * c.num_tokens * c.num_heads, row = c.head_dim + c.gap;
  std::vector<unsigned char> memory((c.offset + rows * row) * kernel_test::element_size(c.dtype), 0xff);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (int64_t r = 0; r < rows; ++r) {
    const float size = c.dtype == DType::float16 ? 1.0f : std::ldexp(1.0f, static_cast<int>(random() % 200) - 100);
    const uint32_t kind = random() % 16;  // most rows are ordinary
    const int special = static_cast<int>(random() % c.head_dim);
    for (int d = 0; d < c.head_dim; ++d) {
      float value = normal(random) * size;
      if (kind == 0) value = 0;
      if (kind == 1) value *= 1e-37f / size;
      if (kind == 2 && d == special) value = static_cast<float>(kernel_test::kInfinity);
      if (kind == 3 && d == special) value = static_cast<float>(kernel_test::kNaN);
      if (kind == 4) value = d % 2 ? -size : size * (d % 256) / 128;  // many ties
      if (std::isinf(value) && c.dtype == DType::float16)
        reinterpret_cast<uint16_t*>(memory.data())[c.offset + r * row + d] = 0x7c00;
      else
        kernel_test::from_float(c.dtype, memory.data(), c.offset + r * row + d, value);
    }
  }
  return memory;
}

inline bool quantised_write_is_right(const QuantisedCase& c, Kernel kernel, const Parallel& parallel) {
  int32_t last = 0;
  for (int32_t start : c.write_start) last = start > last ? start : last;
  const int pages_per_stream = (last + c.num_tokens + c.page_size - 1) / c.page_size + 1;
  const int num_pages = c.batch * pages_per_stream;
  const int64_t row = c.head_dim + c.gap, token = c.num_heads * row;
  const int64_t page_row = c.row_bytes() + c.gap, page_token = c.num_heads * page_row;

  KVCacheWriteParams p;
  p.format = c.format, p.dtype = c.dtype, p.element_size = kernel_test::element_size(c.dtype);
  p.batch = c.batch, p.num_tokens = c.num_tokens, p.num_kv_heads = c.num_heads;
  p.head_dim = c.head_dim, p.page_size = c.page_size;
  const std::vector<unsigned char> k = random_tokens(c, 1), v = random_tokens(c, 2);
  std::vector<float> k_offset(c.num_heads * c.head_dim);
  std::mt19937 random(3);
  for (float& value : k_offset) value = std::normal_distribution<float>()(random);
  p.k_offset = c.with_offset ? k_offset.data() : nullptr;
  std::vector<unsigned char> k_pages = numbered(c.offset + num_pages * c.page_size * page_token, 3);
  std::vector<unsigned char> v_pages = numbered(k_pages.size(), 4);
  std::vector<uint16_t> k_scales(num_pages * c.page_size * c.num_heads * c.groups(), 0x1234), v_scales = k_scales;
  p.k = {k.data() + c.offset * p.element_size, c.num_tokens * token, token, row};
  p.v = {v.data() + c.offset * p.element_size, c.num_tokens * token, token, row};
  p.k_pages = k_pages.data() + c.offset, p.v_pages = v_pages.data() + c.offset;
  p.k_page_stride = p.v_page_stride = c.page_size * page_token;
  p.k_token_stride = p.v_token_stride = page_token;
  p.k_head_stride = p.v_head_stride = page_row;
  p.k_scales = k_scales.data(), p.v_scales = v_scales.data();
  std::vector<int32_t> page_table(num_pages);
  for (int i = 0; i < num_pages; ++i) page_table[i] = num_pages - 1 - i;
  p.page_table = page_table.data(), p.table_stride = pages_per_stream;
  p.write_start = c.write_start.data();

  std::vector<unsigned char> expected_k = k_pages, expected_v = v_pages;
  std::vector<uint16_t> expected_k_scales = k_scales, expected_v_scales = v_scales;
  std::vector<float> shifted(c.head_dim);
  for (int b = 0; b < c.batch; ++b)
    for (int i = 0; i < c.num_tokens; ++i)
      for (int h = 0; h < c.num_heads; ++h) {
        const int position = c.write_start[b] + i;
        const int64_t slot =
            static_cast<int64_t>(page_table[b * pages_per_stream + position / c.page_size]) * c.page_size +
            position % c.page_size;
        const int64_t from = c.offset + (b * c.num_tokens + i) * token + h * row;
        const int64_t to = c.offset + slot * page_token + h * page_row;
        const int64_t scale = (slot * c.num_heads + h) * c.groups();
        for (int d = 0; d < c.head_dim; ++d)
          shifted[d] = kernel_test::to_float(c.dtype, k.data(), from + d) -
                       (c.with_offset ? k_offset[h * c.head_dim + d] : 0.0f);
        quantise_exactly(c.format, shifted, &expected_k[to], &expected_k_scales[scale]);
        for (int d = 0; d < c.head_dim; ++d) shifted[d] = kernel_test::to_float(c.dtype, v.data(), from + d);
        quantise_exactly(c.format, shifted, &expected_v[to], &expected_v_scales[scale]);
      }
  p.parallel = parallel;
  kernel(p);
  return k_pages == expected_k && v_pages == expected_v && k_scales == expected_k_scales &&
         v_scales == expected_v_scales;
}

// Checks every case of every format on each of `thread_counts` threads; whether all passed.
inline bool check_all_quantised(Kernel kernel, const std::vector<int>& thread_counts) {
  int passed = 0, failed = 0;
  for (const PageFormat format : {PageFormat::int8, PageFormat::fp8_e4m3, PageFormat::int4})
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      for (const bool with_offset : {false, true}) {
        const int odd = format == PageFormat::int4 ? 96 : 40;  // not a whole number of vectors
        const QuantisedCase cases[] = {
            {format, dtype, 1, 12, 2, 64, 4, with_offset, 0, 0, {0}},
            {format, dtype, 2, 37, 3, odd, 5, with_offset, 0, 0, {3, 11}},
            {format, dtype, 2, 9, 1, 32, 16, with_offset, 3, 1, {0, 40}},
            {format, dtype, 1, 40, 2, 128, 7, with_offset, 8, 0, {6}},
            {format, dtype, 1, 5, 2, 256, 2, with_offset, 0, 5, {1}},
            {format, dtype, 2, 0, 2, 64, 4, with_offset, 0, 0, {0, 0}},
        };
        for (const QuantisedCase& c : cases)
          for (int num_threads : thread_counts) {
            bool right = false;
            try {
              right = quantised_write_is_right(c, kernel, {num_threads, kernel_test::run_on_threads});
            } catch (const std::exception& error) {
              std::printf("%s\n", error.what());
            }
            right ? ++passed : ++failed;
            if (!right)
              std::printf("FAILED  %s of %s%s, case %d, %d threads\n", format_name(format),
                          kernel_test::dtype_name(dtype), with_offset ? " with offset" : "",
                          static_cast<int>(&c - cases), num_threads);
          }
      }
  std::printf("quantised: %d passed, %d failed\n", passed, failed);
  return failed == 0;
}

// ---- Pages of elements: checks every case on each of `thread_counts` threads; whether all passed.
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
