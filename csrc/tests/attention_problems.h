// Attention problems for the tests of every kernel: cases (head dims, lengths, spans, pages, empty rows), the
// definition as a double loop in float64, and the comparison. Memory that a kernel must not read holds NaN, memory that
// it must not write is looked at afterwards.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../attention/params.h"
#include "elements.h"

namespace selfforcing::attention_test {

using namespace kernel_test;

// The kernels under test: bytes of workspace, then the pass. Without `backward` the forward pass is tested alone.
struct Kernels {
  int64_t (*forward_workspace_bytes)(const AttentionParams&);
  void (*forward)(const AttentionParams&);
  int64_t (*backward_workspace_bytes)(const AttentionBackwardParams&) = nullptr;
  void (*backward)(const AttentionBackwardParams&) = nullptr;
};

using Intervals = std::vector<std::pair<int32_t, int32_t>>;

// ---- Tensors

// A [batch, tokens, heads, dim] tensor with gaps between its rows, tokens and batches, multiples of `gaps` elements;
// the gaps hold NaN.
struct TestTensor {
  DType dtype;
  int batch, tokens, heads, dim;
  int64_t head_stride, token_stride, batch_stride;
  std::vector<char> bytes;

  TestTensor(DType dtype, int batch, int tokens, int heads, int dim, int gaps)
      : dtype(dtype),
        batch(batch),
        tokens(tokens),
        heads(heads),
        dim(dim),
        head_stride(dim + 3 * gaps),
        token_stride(heads * head_stride + 5 * gaps),
        batch_stride(tokens * token_stride + 7 * gaps),
        bytes((batch * batch_stride) * element_size(dtype)) {
    for (int64_t i = 0; i < batch * batch_stride; ++i) from_float(dtype, bytes.data(), i, kNaN);
  }
  int64_t index(int b, int token, int head, int d) const {
    return b * batch_stride + token * token_stride + head * head_stride + d;
  }
  float at(int b, int token, int head, int d) const { return to_float(dtype, bytes.data(), index(b, token, head, d)); }
  void fill(std::mt19937& random, float size) {
    std::normal_distribution<float> normal(0, size);
    for (int b = 0; b < batch; ++b)
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < heads; ++h)
          for (int d = 0; d < dim; ++d) set(b, t, h, d, normal(random));
  }
  void fill_token(int b, int token, float value) {
    for (int h = 0; h < heads; ++h)
      for (int d = 0; d < dim; ++d) set(b, token, h, d, value);
  }
  void set(int b, int t, int h, int d, float value) {
    if (!std::isnan(value) && dtype != DType::float32) {
      uint32_t wide;
      std::memcpy(&wide, &value, sizeof(wide));
      wide &= 0xffff0000u;
      std::memcpy(&value, &wide, sizeof(wide));
    }
    from_float(dtype, bytes.data(), index(b, t, h, d), value);
  }
  ConstHeads heads_in() const { return {bytes.data(), batch_stride, token_stride, head_stride}; }
  MutableHeads heads_out() { return {bytes.data(), batch_stride, token_stride, head_stride}; }
  bool gaps_untouched() const {
    std::vector<bool> inside(batch * batch_stride);
    for (int b = 0; b < batch; ++b)
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < heads; ++h)
          for (int d = 0; d < dim; ++d) inside[index(b, t, h, d)] = true;
    for (int64_t i = 0; i < batch * batch_stride; ++i)
      if (!inside[i] && !std::isnan(to_float(dtype, bytes.data(), i))) return false;
    return true;
  }
};

// ---- Cases

// What a past may be beyond pages of q's dtype with one list of spans per stream: kernels that lack one leave out the
// cases that need it.
constexpr unsigned kBias = 1, kHeadLists = 2, kGradPages = 4, kQuantised = 8, kRotated = 16, kAllFeatures = 31;

struct Case {
  const char* name;
  int batch, heads, kv_heads, dim;
  std::vector<int32_t> block_starts;  // the last one is the number of queries
  std::vector<Intervals> spans;       // of each block
  int num_keys;
  int page_size = 0;                 // 0: no past
  std::vector<Intervals> past = {};  // of each stream, or of each K/V head of each; empty intervals fill up
  int gaps = 1;
  bool grad_lse = true;
  float scale = 0;               // 0: 1 / sqrt(dim)
  std::vector<float> bias = {};  // of the first, second ... interval of every list
  bool grad_pages = false;       // some pages of the past get gradients
  PageFormat format = PageFormat::elements;
  bool k_offset = false;
  std::array<int32_t, 3> rope_grid = {};  // positions along frames, rows, columns; 0: keys are not rotated

  bool rotated() const { return rope_grid[0] > 0; }
  int span_lists() const { return static_cast<int>(past.size()) > batch ? kv_heads : 1; }
  const Intervals& past_of(int b, int kv_head) const {
    return past[b * span_lists() + (span_lists() == 1 ? 0 : kv_head)];
  }
  unsigned features() const {
    return (bias.empty() ? 0u : kBias) | (span_lists() > 1 ? kHeadLists : 0u) | (grad_pages ? kGradPages : 0u) |
           (format != PageFormat::elements ? kQuantised : 0u) | (rotated() ? kRotated : 0u);
  }

  int num_queries() const { return block_starts.back(); }
  // Of one matrix product.
  double multiplications() const {
    double keys = static_cast<double>(batch) * num_keys;
    for (const Intervals& list : past)
      for (auto [start, end] : list) keys += static_cast<double>(end - start) / span_lists();
    return keys * heads * num_queries() * dim;
  }
  double softmax_scale() const { return scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(dim)); }
};

inline Case block_causal(const char* name, int batch, int heads, int dim, int blocks, int block_length) {
  Case c{name, batch, heads, heads, dim, {0}, {}, blocks * block_length};
  for (int i = 0; i < blocks; ++i) {
    c.block_starts.push_back((i + 1) * block_length);
    c.spans.push_back({{0, (i + 1) * block_length}});
  }
  return c;
}

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (int dim : {8, 16, 24, 32, 40, 64, 72, 96, 128, 200, 256})
    all.push_back({"dims", 2, 2, 1, dim, {0, 37}, {{{0, 53}}}, 53});
  for (int length : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 80, 112})
    all.push_back({"lengths", 1, 1, 1, 32, {0, length}, {{{0, length + 1}}}, length + 1});
  all.push_back(block_causal("block causal", 2, 3, 32, 4, 48));
  all.push_back(block_causal("blocks beside tiles", 1, 2, 64, 5, 29));
  all.push_back(block_causal("one query a block", 1, 1, 32, 9, 1));
  all.push_back(block_causal("long block causal", 1, 1, 64, 3, 450));
  all.push_back(block_causal("many heads", 6, 3, 16, 2, 20));
  all.push_back({"window and sink",
                 2,
                 4,
                 2,
                 40,
                 {0, 20, 40, 60, 80},
                 {{{0, 20}}, {{0, 40}}, {{0, 10}, {30, 60}}, {{0, 10}, {50, 80}}},
                 80});
  all.push_back({"teacher forcing",
                 1,
                 2,
                 2,
                 32,
                 {0, 24, 48, 72, 96},
                 {{{0, 24}}, {{0, 48}}, {{48, 72}}, {{0, 24}, {72, 96}}},
                 96});
  all.push_back({"unseen keys and empty rows", 2, 2, 2, 24, {0, 5, 21, 30}, {{{3, 9}, {11, 12}}, {}, {{40, 51}}}, 70});
  all.push_back({"many keys", 1, 1, 1, 128, {0, 20}, {{{5, 700}}}, 701});
  all.push_back({"many queries", 1, 4, 2, 32, {0, 1100}, {{{0, 40}}}, 40});
  all.push_back({"past", 2, 4, 2, 32, {0, 48}, {{{0, 48}}}, 48, 16, {{{0, 16}, {32, 80}}, {{5, 41}, {48, 49}}}});
  all.push_back(
      {"past of one stream only", 2, 1, 1, 72, {0, 30}, {{{0, 30}}}, 30, 7, {{{0, 0}, {9, 30}}, {{0, 0}, {0, 0}}}});
  all.push_back({"past alone", 2, 2, 1, 16, {0, 9, 20}, {{}, {{2, 4}}}, 6, 4, {{{3, 10}}, {{0, 0}}}});
  all.push_back({"long past", 1, 2, 2, 64, {0, 70}, {{{0, 70}}}, 70, 50, {{{0, 60}, {333, 811}}}});
  all.push_back({"no queries", 2, 2, 2, 32, {0}, {}, 12});
  all.push_back({"no keys", 2, 2, 2, 32, {0, 12}, {{}}, 0});
  all.push_back({"no batch", 0, 2, 2, 32, {0, 12}, {{{0, 12}}}, 12});
  all.push_back({"without grad_lse", 1, 2, 2, 64, {0, 33}, {{{0, 65}}}, 65, 0, {}, 0, false});
  all.push_back({"sharp softmax", 1, 1, 1, 64, {0, 40}, {{{0, 300}}}, 300, 0, {}, 1, true, 3.0f});
  all.push_back({"negative scale", 1, 1, 1, 64, {0, 40}, {{{0, 60}}}, 60, 0, {}, 1, true, -1.5f});

  const auto add = [&](const char* name, Case c, const auto& change) {
    c.name = name;
    change(c);
    all.push_back(c);
  };
  const Case ragged{"streams of many lengths",
                    5,
                    4,
                    2,
                    32,
                    {0, 20},
                    {{{0, 20}}},
                    20,
                    16,
                    {{{0, 0}, {0, 9}}, {{0, 48}, {60, 300}}, {{5, 17}, {17, 17}}, {{0, 0}, {0, 0}}, {{0, 1}, {2, 73}}}};
  all.push_back(ragged);
  const Case lists{"a list per head",
                   2,
                   4,
                   2,
                   40,
                   {0, 33},
                   {{{0, 33}}},
                   33,
                   7,
                   {{{0, 7}, {14, 60}}, {{3, 4}, {5, 5}}, {{0, 0}, {0, 0}}, {{0, 21}, {30, 200}}}};
  all.push_back(lists);
  const Case few{
      "few queries, long past", 1, 1, 1, 64, {0, 20}, {{{0, 20}}}, 20, 64, {{{0, 100}, {130, 430}, {430, 800}}}};
  all.push_back(few);
  add("bias", lists, [](Case& c) { c.bias = {1.5f, -0.75f}; });
  add("bias, negative scale", lists, [](Case& c) { c.bias = {1.5f, -0.75f}, c.scale = -0.5f; });
  add("bias, long past", few, [](Case& c) { c.bias = {2.5f, -1.5f, -1.5f}; });
  add("one bias for the past", few, [](Case& c) { c.bias = {-2, -2, -2}; });
  add("bias, many lengths", ragged, [](Case& c) { c.bias = {-3, 0.5f}; });
  add("bias and window", all.back(), [](Case& c) {
    c.block_starts = {0, 5, 12, 20};
    c.spans = {{{0, 5}}, {}, {{0, 4}, {12, 20}}};
  });
  add("gradients of the past", lists, [](Case& c) { c.grad_pages = true; });
  add("gradients of the past, bias", lists, [](Case& c) { c.grad_pages = true, c.bias = {1.5f, -0.75f}; });
  add("gradients of a long past", few, [](Case& c) { c.grad_pages = true, c.bias = {2.5f, -1.5f, -1.5f}; });
  add("gradients, many lengths", ragged, [](Case& c) { c.grad_pages = true; });
  const Case paged{"", 2, 4, 2, 32, {0, 18}, {{{0, 18}}}, 18, 7, {{{0, 7}, {14, 61}}, {{3, 4}, {5, 150}}}};
  for (PageFormat format : {PageFormat::int8, PageFormat::fp8_e4m3, PageFormat::int4}) {
    for (int dim : {8, 40, 64, 200, 256})
      if (format != PageFormat::int4 || dim % kInt4Group == 0)
        add("quantised", paged, [&](Case& c) { c.format = format, c.dim = dim, c.k_offset = dim != 64; });
    add("quantised, gradients", lists,
        [&](Case& c) { c.format = format, c.dim = 96, c.k_offset = c.grad_pages = true, c.bias = {1.5f, -0.75f}; });
  }
  for (int dim : {8, 24, 32, 40, 72, 128, 256})
    add("rotated", paged, [&](Case& c) { c.dim = dim, c.rope_grid = {11, 3, 5}; });
  add("rotated, one column", paged, [](Case& c) { c.rope_grid = {4, 60, 1}; });
  add("rotated, gradients", lists,
      [](Case& c) { c.grad_pages = true, c.rope_grid = {20, 4, 3}, c.bias = {1.5f, -0.75f}; });
  add("rotated, gradients of a long past", few, [](Case& c) { c.grad_pages = true, c.rope_grid = {40, 5, 4}; });
  for (PageFormat format : {PageFormat::int8, PageFormat::fp8_e4m3, PageFormat::int4})
    add("quantised and rotated", lists, [&](Case& c) {
      c.format = format, c.dim = 64, c.k_offset = c.grad_pages = true, c.bias = {1.5f, -0.75f};
      c.rope_grid = {20, 4, 3};
    });
  all.push_back({"few queries, many keys", 1, 1, 1, 16, {0, 3}, {{{5, 1299}}}, 1300});
  all.push_back({"few queries that see few of many keys", 1, 1, 1, 16, {0, 3}, {{{3, 11}}}, 1300});
  all.push_back({"few queries that see none of many keys", 1, 1, 1, 16, {0, 3}, {{}}, 1300});
  return all;
}

// ---- The definition

// A key that the queries of a block see.
struct Key {
  bool past;
  int index;  // position in the past, or key
  double bias = 0;
  int token = 0;  // where a key that is rotated stands
};

// Rounded to nearest even.
inline double round_to(DType dtype, double value) {
  constexpr int kBits[] = {24, 8, 11}, kSmallest[] = {-149, -133, -24};
  int exponent;
  std::frexp(value, &exponent);
  const int type = static_cast<int>(dtype);
  const double unit = std::ldexp(1, std::max(exponent - kBits[type], kSmallest[type]));
  return std::nearbyint(value / unit) * unit;
}

// Quantised elements and their scales, both with NaN or anything where nothing visible lies. The gaps between rows,
// tokens and pages are those of the tensor of values, in bytes.
struct QuantisedPages {
  int64_t head_stride = 0, token_stride = 0, page_stride = 0;
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> scales;

  // Random elements and scales for the rows whose values are not NaN, and the values that these stand for.
  QuantisedPages(PageFormat format, TestTensor& values, const float* offset, std::mt19937& random) {
    const bool int4 = format == PageFormat::int4;
    const int stored = int4 ? values.dim / 2 : values.dim, groups = int4 ? values.dim / kInt4Group : 1;
    head_stride = stored + values.head_stride - values.dim;
    token_stride = values.heads * (head_stride - values.head_stride) + values.token_stride;
    page_stride = values.tokens * (token_stride - values.token_stride) + values.batch_stride;
    bytes.assign(values.batch * page_stride, 0x7f);
    scales.assign(static_cast<size_t>(values.batch) * values.tokens * values.heads * groups, 0x7fc0);
    for (int page = 0; page < values.batch; ++page)
      for (int slot = 0; slot < values.tokens; ++slot)
        for (int h = 0; h < values.heads; ++h) {
          if (std::isnan(values.at(page, slot, h, 0))) continue;
          uint16_t* scale = &scales[((static_cast<size_t>(page) * values.tokens + slot) * values.heads + h) * groups];
          for (int g = 0; g < groups; ++g) from_float(DType::bfloat16, scale, g, draw_scale(format, random));
          uint8_t* row = &bytes[page * page_stride + slot * token_stride + h * head_stride];
          for (int d = 0; d < values.dim; ++d) {
            const float value =
                draw_element(format, row, d, random) * to_float(DType::bfloat16, scale, int4 ? d / kInt4Group : 0);
            values.set(page, slot, h, d, offset == nullptr ? value : value + offset[h * values.dim + d]);
          }
        }
  }

 private:
  static float draw_scale(PageFormat format, std::mt19937& random) {
    const float size = format == PageFormat::int8 ? 0.02f : format == PageFormat::fp8_e4m3 ? 0.01f : 0.3f;
    return size * (0.5f + static_cast<float>(random() % 256) / 256);
  }
  // Puts a random element where channel d of the row is, and returns its value.
  static float draw_element(PageFormat format, uint8_t* row, int d, std::mt19937& random) {
    if (format == PageFormat::int8) {
      const int value = static_cast<int>(random() % 255) - 127;
      row[d] = static_cast<uint8_t>(value);
      return static_cast<float>(value);
    }
    if (format == PageFormat::fp8_e4m3) {
      const int bits = static_cast<int>(random() % 127), exponent = bits >> 3, fraction = bits & 7;
      const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10) : std::ldexp(1.0f * fraction, -9);
      const bool negative = random() % 2;
      row[d] = static_cast<uint8_t>(bits | (negative ? 0x80 : 0));
      return negative ? -size : size;
    }
    const int value = static_cast<int>(random() % 15) - 7, half = d % kInt4Group / 16;
    uint8_t& byte = row[d / kInt4Group * 16 + d % 16];
    byte = static_cast<uint8_t>(half == 0 ? (byte & 0xf0) | (value + 8) : (byte & 0x0f) | (value + 8) << 4);
    return static_cast<float>(value);
  }
};

struct Problem {
  Case c;
  DType dtype;
  TestTensor q, k, v, grad_out;
  TestTensor k_pages, v_pages;            // of quantised pages the values, in float32
  std::vector<QuantisedPages> quantised;  // those of keys and of values
  std::vector<float> k_offset, rope_table;
  RopeAxes rope_axes;
  std::vector<float> grad_lse;
  std::vector<int32_t> span_offsets{0}, spans, key_starts, query_span_offsets{0}, query_spans, page_table,
      grad_page_table;
  std::vector<PastSpan> past_spans;
  int pages_per_stream = 0, num_grad_pages = 0;

  Problem(const Case& c, DType dtype, unsigned seed)
      : c(c),
        dtype(dtype),
        q(dtype, c.batch, c.num_queries(), c.heads, c.dim, c.gaps),
        k(dtype, c.batch, c.num_keys, c.kv_heads, c.dim, c.gaps),
        v(k),
        grad_out(q),
        k_pages(dtype, 0, 0, 0, 0, 0),
        v_pages(k_pages) {
    std::mt19937 random(seed);
    for (TestTensor* tensor : {&q, &k, &v, &grad_out}) tensor->fill(random, 1);
    std::normal_distribution<float> normal;
    grad_lse.resize(static_cast<size_t>(c.batch) * c.heads * c.num_queries());
    for (float& value : grad_lse) value = normal(random);
    for (const Intervals& list : c.spans) {
      for (auto [start, end] : list) spans.insert(spans.end(), {start, end});
      span_offsets.push_back(spans.size() / 2);
    }
    transpose_spans();
    std::vector<bool> seen(c.num_keys);
    for (const Intervals& list : c.spans)
      for (auto [start, end] : list)
        for (int key = start; key < end; ++key) seen[key] = true;
    for (int key = 0; key < c.num_keys; ++key)
      if (!seen[key])
        for (int b = 0; b < c.batch; ++b) k.fill_token(b, key, kNaN), v.fill_token(b, key, kNaN);
    if (c.page_size > 0) make_pages(random);
  }

  void transpose_spans() {
    for (int key = 0; key < c.num_keys; ++key) {
      bool border = key == 0;
      for (const Intervals& list : c.spans)
        for (auto [start, end] : list) border = border || key == start || key == end;
      if (border) key_starts.push_back(key);
    }
    key_starts.push_back(c.num_keys);
    for (size_t run = 0; run + 1 < key_starts.size(); ++run) {
      for (size_t block = 0; block < c.spans.size(); ++block)
        for (auto [start, end] : c.spans[block])
          if (start <= key_starts[run] && key_starts[run] < end) {
            const bool touches = static_cast<int>(query_spans.size()) > 2 * query_span_offsets.back() &&
                                 query_spans.back() == c.block_starts[block];
            if (touches)
              query_spans.back() = c.block_starts[block + 1];
            else
              query_spans.insert(query_spans.end(), {c.block_starts[block], c.block_starts[block + 1]});
          }
      query_span_offsets.push_back(query_spans.size() / 2);
    }
  }

  void make_pages(std::mt19937& random) {
    int positions = 0;
    for (const Intervals& list : c.past)
      for (auto [start, end] : list) positions = std::max(positions, end);
    pages_per_stream = (positions + c.page_size - 1) / c.page_size;
    const int pages = c.batch * pages_per_stream + 2;
    const bool quantise = c.format != PageFormat::elements;
    k_pages = TestTensor(quantise ? DType::float32 : dtype, pages, c.page_size, c.kv_heads, c.dim, c.gaps);
    v_pages = k_pages;
    std::vector<int32_t> order(pages);
    for (int i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    page_table.assign(order.begin(), order.begin() + c.batch * pages_per_stream);
    TestTensor k_values = k_pages, v_values = v_pages;
    k_values.fill(random, 1), v_values.fill(random, 1);
    for (const Intervals& list : c.past)
      for (size_t i = 0; i < list.size(); ++i)
        past_spans.push_back({list[i].first, list[i].second, first_token(list, i), c.bias.empty() ? 0.0f : c.bias[i]});
    for (int b = 0; b < c.batch; ++b)
      for (int h = 0; h < c.kv_heads; ++h)
        for (auto [start, end] : c.past_of(b, h))
          for (int position = start; position < end; ++position)
            for (int d = 0; d < c.dim; ++d) {
              const int page = page_of(b, position), slot = position % c.page_size;
              k_pages.set(page, slot, h, d, k_values.at(page, slot, h, d));
              v_pages.set(page, slot, h, d, v_values.at(page, slot, h, d));
            }
    std::normal_distribution<float> normal;
    if (c.k_offset)
      for (int i = 0; i < c.kv_heads * c.dim; ++i) k_offset.push_back(normal(random));
    if (quantise) {
      quantised.emplace_back(c.format, k_pages, c.k_offset ? k_offset.data() : nullptr, random);
      quantised.emplace_back(c.format, v_pages, nullptr, random);
    }
    if (c.rotated()) make_rope_table();
    // Two pages of three get gradients, of a long past the newer half.
    if (c.grad_pages)
      for (size_t i = 0; i < page_table.size(); ++i)
        grad_page_table.push_back(i % 3 == 1 || (pages_per_stream > 8 && i % pages_per_stream < pages_per_stream / 2u)
                                      ? -1
                                      : num_grad_pages++);
    std::reverse(grad_page_table.begin(), grad_page_table.end());
  }
  void make_rope_table() {
    rope_axes = RopeAxes(c.rope_grid[0], c.rope_grid[1], c.rope_grid[2], c.dim);
    for (int axis = 0; axis < 3; ++axis)
      for (int position = 0; position < rope_axes.size[axis]; ++position)
        for (int j = 0; j < rope_axes.pairs[axis]; ++j) {
          const double angle = position * rope_axes.frequency(axis, j);
          rope_table.insert(rope_table.end(),
                            {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
        }
  }
  // Intervals are numbered one after the other, as a window is, but not from 0.
  int first_token(const Intervals& list, size_t interval) const {
    int token = c.rotated() ? 2 : 0;
    for (size_t i = 0; c.rotated() && i < interval; ++i) token += list[i].second - list[i].first;
    return token;
  }
  // Cosine and sine of pair j of a key.
  std::pair<double, double> turn(int token, int j) const {
    const int in_frame = rope_axes.size[1] * rope_axes.size[2];
    const int position[] = {token / in_frame, token % in_frame / rope_axes.size[2], token % rope_axes.size[2]};
    int axis = 0;
    for (; j >= rope_axes.pairs[axis]; ++axis) j -= rope_axes.pairs[axis];
    const int64_t entry = rope_axes.table_offset(axis) + position[axis] * rope_axes.pairs[axis] + j;
    return {rope_table[2 * entry], rope_table[2 * entry + 1]};
  }
  int page_of(int b, int position) const { return page_table[b * pages_per_stream + position / c.page_size]; }

  // In order.
  std::vector<Key> visible(int b, int kv_head, size_t block) const {
    std::vector<Key> keys;
    if (c.page_size > 0) {
      const Intervals& list = c.past_of(b, kv_head);
      for (size_t i = 0; i < list.size(); ++i)
        for (int position = list[i].first; position < list[i].second; ++position)
          keys.push_back(
              {true, position, c.bias.empty() ? 0 : c.bias[i], first_token(list, i) + position - list[i].first});
    }
    for (auto [start, end] : c.spans[block])
      for (int key = start; key < end; ++key) keys.push_back({false, key});
    return keys;
  }
  // Their rows of one head as attention sees them, [keys, dim].
  std::vector<double> rows(const TestTensor& own, const TestTensor& pages, int b, int h, const std::vector<Key>& keys,
                           bool rotated) const {
    std::vector<double> values;
    values.reserve(keys.size() * c.dim);
    for (const Key& key : keys) {
      const size_t row = values.size();
      for (int d = 0; d < c.dim; ++d)
        values.push_back(key.past ? pages.at(page_of(b, key.index), key.index % c.page_size, h, d)
                                  : own.at(b, key.index, h, d));
      if (!key.past) continue;
      for (int d = 0; rotated && d < c.dim; d += 2) {
        const auto [cosine, sine] = turn(key.token, d / 2);
        const double x = values[row + d], y = values[row + d + 1];
        values[row + d] = x * cosine - y * sine;
        values[row + d + 1] = x * sine + y * cosine;
      }
      for (int d = 0; d < c.dim; ++d) values[row + d] = round_to(dtype, values[row + d]);
    }
    return values;
  }
  // Where the gradient of a key of the past is summed: the row of one head, -1 if nowhere.
  int64_t grad_row(int b, int h, const Key& key) const {
    if (!c.grad_pages) return -1;
    const int64_t page = grad_page_table[b * pages_per_stream + key.index / c.page_size];
    return page < 0 ? -1 : ((page * c.page_size + key.index % c.page_size) * c.kv_heads + h) * c.dim;
  }
};

// Gradients of scores are differences p (dp - delta); their rounding error is in proportion to p (|dp| + |delta|), not
// to what is left, so gradients come with the size of their terms.
struct Values {
  std::vector<double> exact, size;
  explicit Values(size_t count) : exact(count), size(count) {}
  void add(size_t index, double term, double size_of_term) {
    exact[index] += term;
    size[index] += std::fabs(size_of_term);
  }
};

struct Exact {
  Values out, grad_q, grad_k, grad_v, grad_k_pages, grad_v_pages;
  std::vector<double> lse;
};

inline Exact define(const Problem& p) {
  const Case& c = p.c;
  const int dim = c.dim, group = c.heads / c.kv_heads;
  const double scale = c.softmax_scale();
  const size_t q_size = static_cast<size_t>(c.batch) * c.num_queries() * c.heads * dim;
  const size_t k_size = static_cast<size_t>(c.batch) * c.num_keys * c.kv_heads * dim;
  const size_t page_size = static_cast<size_t>(p.num_grad_pages) * c.page_size * c.kv_heads * dim;
  Exact exact{Values(q_size), Values(q_size), Values(k_size), Values(k_size), Values(page_size), Values(page_size), {}};
  exact.lse.assign(static_cast<size_t>(c.batch) * c.heads * c.num_queries(), -kInfinity);
  const auto define_query = [&](int b, int h, int query, const std::vector<Key>& keys,
                                const std::vector<double>& k_rows, const std::vector<double>& v_rows) {
    std::vector<double> q(dim), grad_out(dim), score(keys.size()), grad(keys.size());
    for (int d = 0; d < dim; ++d) q[d] = p.q.at(b, query, h, d), grad_out[d] = p.grad_out.at(b, query, h, d);
    double largest = -kInfinity, sum = 0, delta = 0;
    for (size_t i = 0; i < keys.size(); ++i) {
      score[i] = keys[i].bias;
      for (int d = 0; d < dim; ++d) score[i] += scale * q[d] * k_rows[i * dim + d];
      largest = std::max(largest, score[i]);
    }
    for (double s : score) sum += std::exp(s - largest);
    const size_t row = (static_cast<size_t>(b) * c.heads + h) * c.num_queries() + query;
    exact.lse[row] = largest + std::log(sum);
    const size_t q_row = ((static_cast<size_t>(b) * c.num_queries() + query) * c.heads + h) * dim;
    for (size_t i = 0; i < keys.size(); ++i) {
      score[i] = std::exp(score[i] - exact.lse[row]);
      for (int d = 0; d < dim; ++d) {
        const double term = score[i] * v_rows[i * dim + d];
        exact.out.add(q_row + d, term, term);
        grad[i] += grad_out[d] * v_rows[i * dim + d];
      }
      delta += score[i] * grad[i];
    }
    if (c.grad_lse) delta -= p.grad_lse[row];
    for (size_t i = 0; i < keys.size(); ++i) {
      const double grad_score = scale * score[i] * (grad[i] - delta);
      const double size = scale * score[i] * (std::fabs(grad[i]) + std::fabs(delta));
      for (int d = 0; d < dim; ++d)
        exact.grad_q.add(q_row + d, grad_score * k_rows[i * dim + d], size * k_rows[i * dim + d]);
      const int64_t own_row = ((static_cast<int64_t>(b) * c.num_keys + keys[i].index) * c.kv_heads + h / group) * dim;
      const int64_t k_row = keys[i].past ? p.grad_row(b, h / group, keys[i]) : own_row;
      if (k_row < 0) continue;
      Values& grad_k = keys[i].past ? exact.grad_k_pages : exact.grad_k;
      Values& grad_v = keys[i].past ? exact.grad_v_pages : exact.grad_v;
      for (int d = 0; d < dim; ++d) grad_v.add(k_row + d, score[i] * grad_out[d], score[i] * grad_out[d]);
      if (!keys[i].past || !c.rotated()) {
        for (int d = 0; d < dim; ++d) grad_k.add(k_row + d, grad_score * q[d], size * q[d]);
        continue;
      }
      for (int d = 0; d < dim; d += 2) {  // of the key as it is stored: rotated back
        const auto [cosine, sine] = p.turn(keys[i].token, d / 2);
        grad_k.add(k_row + d, grad_score * q[d] * cosine, size * q[d] * cosine);
        grad_k.add(k_row + d, grad_score * q[d + 1] * sine, size * q[d + 1] * sine);
        grad_k.add(k_row + d + 1, -grad_score * q[d] * sine, size * q[d] * sine);
        grad_k.add(k_row + d + 1, grad_score * q[d + 1] * cosine, size * q[d + 1] * cosine);
      }
    }
  };
  for (int b = 0; b < c.batch; ++b)
    for (size_t block = 0; block < c.spans.size(); ++block) {
      for (int h = 0; h < c.heads; ++h) {
        const std::vector<Key> keys = p.visible(b, h / group, block);
        if (keys.empty()) continue;
        const std::vector<double> k_rows = p.rows(p.k, p.k_pages, b, h / group, keys, c.rotated());
        const std::vector<double> v_rows = p.rows(p.v, p.v_pages, b, h / group, keys, false);
        for (int query = c.block_starts[block]; query < c.block_starts[block + 1]; ++query)
          define_query(b, h, query, keys, k_rows, v_rows);
      }
    }
  return exact;
}

// ---- The kernels

// Exactly as many bytes as asked for, filled with NaN, with a border that must survive.
struct Workspace {
  static constexpr size_t kBorder = 64;
  std::vector<char> bytes;
  char* start;
  size_t size;
  explicit Workspace(size_t size) : bytes(size + 64 + kBorder, '\xff'), size(size) {
    start = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
  }
  bool border_intact() const {
    for (size_t i = 0; i < kBorder; ++i)
      if (start[size + i] != '\xff') return false;
    return true;
  }
};

struct Results {
  TestTensor out, grad_q, grad_k, grad_v, grad_k_pages, grad_v_pages;
  std::vector<float> lse;
  bool borders_intact = true, adds_to_pages = true;

  bool operator==(const Results& other) const {
    return out.bytes == other.out.bytes && grad_q.bytes == other.grad_q.bytes && grad_k.bytes == other.grad_k.bytes &&
           grad_v.bytes == other.grad_v.bytes && grad_k_pages.bytes == other.grad_k_pages.bytes &&
           grad_v_pages.bytes == other.grad_v_pages.bytes &&
           (lse.empty() || std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0);
  }
};

inline Results compute(const Problem& p, const Kernels& kernels, int num_threads) {
  const Case& c = p.c;
  auto like = [&](const TestTensor& t) { return TestTensor(p.dtype, t.batch, t.tokens, t.heads, t.dim, c.gaps); };
  TestTensor grad_pages(DType::float32, p.num_grad_pages, c.page_size, c.kv_heads, c.dim, 0);
  std::fill(grad_pages.bytes.begin(), grad_pages.bytes.end(), 0);
  Results r{
      like(p.q), like(p.q), like(p.k), like(p.k), grad_pages, grad_pages, std::vector<float>(p.grad_lse.size(), kNaN)};
  AttentionBackwardParams a;
  a.dtype = p.dtype;
  a.batch = c.batch, a.num_heads = c.heads, a.num_kv_heads = c.kv_heads, a.head_dim = c.dim;
  a.num_queries = c.num_queries(), a.num_keys = c.num_keys;
  a.softmax_scale = static_cast<float>(c.softmax_scale());
  a.q = p.q.heads_in(), a.k = p.k.heads_in(), a.v = p.v.heads_in();
  a.out = r.out.heads_out();
  a.lse = r.lse.data();
  a.spans = {static_cast<int32_t>(c.spans.size()), c.block_starts.data(), p.span_offsets.data(), p.spans.data()};
  if (c.page_size > 0) {
    const auto stored = [&](const TestTensor& pages, size_t index, auto* data, auto* scales, int64_t* strides) {
      if (p.quantised.empty()) {
        *data = pages.bytes.data();
        strides[0] = pages.batch_stride, strides[1] = pages.token_stride, strides[2] = pages.head_stride;
        return;
      }
      const QuantisedPages& of = p.quantised[index];
      *data = of.bytes.data(), *scales = of.scales.data();
      strides[0] = of.page_stride, strides[1] = of.token_stride, strides[2] = of.head_stride;
    };
    int64_t strides[3];
    stored(p.k_pages, 0, &a.past.k_pages, &a.past.k_scales, strides);
    a.past.k_page_stride = strides[0], a.past.k_token_stride = strides[1], a.past.k_head_stride = strides[2];
    stored(p.v_pages, 1, &a.past.v_pages, &a.past.v_scales, strides);
    a.past.v_page_stride = strides[0], a.past.v_token_stride = strides[1], a.past.v_head_stride = strides[2];
    a.past.format = c.format;
    a.past.k_offset = c.k_offset ? p.k_offset.data() : nullptr;
    a.past.rope_table = c.rotated() ? p.rope_table.data() : nullptr;
    a.past.rope_axes = p.rope_axes;
    a.past.num_pages = p.k_pages.batch;
    a.past.page_size = c.page_size;
    a.past.page_table = p.page_table.data();
    a.past.table_stride = p.pages_per_stream;
    a.past.spans = p.past_spans.data();
    a.past.span_lists = c.span_lists();
    a.past.num_spans = c.past.empty() ? 0 : c.past[0].size();
  }
  a.parallel = {num_threads, run_on_threads};
  Workspace forward_space(kernels.forward_workspace_bytes(a));
  a.workspace = forward_space.start;
  kernels.forward(a);
  r.borders_intact = forward_space.border_intact();
  if (kernels.backward == nullptr) return r;

  a.query_spans = {static_cast<int32_t>(p.key_starts.size()) - 1, p.key_starts.data(), p.query_span_offsets.data(),
                   p.query_spans.data()};
  a.grad_out = p.grad_out.heads_in();
  a.grad_lse = c.grad_lse ? p.grad_lse.data() : nullptr;
  std::vector<float> delta(p.grad_lse.size(), kNaN);
  a.delta = delta.data();
  a.grad_q = r.grad_q.heads_out(), a.grad_k = r.grad_k.heads_out(), a.grad_v = r.grad_v.heads_out();
  if (c.grad_pages)
    a.past_grads = {reinterpret_cast<float*>(r.grad_k_pages.bytes.data()),
                    reinterpret_cast<float*>(r.grad_v_pages.bytes.data()), p.grad_page_table.data()};
  Workspace backward_space(kernels.backward_workspace_bytes(a));
  a.workspace = backward_space.start;
  kernels.backward(a);
  if (c.grad_pages) {  // twice: what is there is added to, and twice a number is exact
    const Results once = r;
    kernels.backward(a);
    for (auto [pages, before] : {std::pair(&r.grad_k_pages, &once.grad_k_pages), {&r.grad_v_pages, &once.grad_v_pages}})
      for (int64_t i = 0; i < pages->batch * pages->batch_stride; ++i)
        if (to_float(pages->dtype, pages->bytes.data(), i) != 2 * to_float(pages->dtype, before->bytes.data(), i))
          r.adds_to_pages = false;
    r.grad_k_pages = once.grad_k_pages, r.grad_v_pages = once.grad_v_pages;
  }
  r.borders_intact = r.borders_intact && forward_space.border_intact() && backward_space.border_intact();
  return r;
}

// ---- Comparison

inline int failures = 0;

inline void fail(const Problem& p, const std::string& what) {
  ++failures;
  constexpr const char* kFormats[] = {"", ", int8", ", fp8_e4m3", ", int4"};
  std::printf("FAILED  %s, %s%s, B %d H %d/%d Lq %d Lk %d D %d: %s\n", p.c.name, dtype_name(p.dtype),
              kFormats[static_cast<int>(p.c.format)], p.c.batch, p.c.heads, p.c.kv_heads, p.c.num_queries(),
              p.c.num_keys, p.c.dim, what.c_str());
}

inline double worst_seen[3][5];

// ||actual - exact|| / ||size of the summed terms||; infinity for NaN and for what must be zero and is not.
inline void compare(const Problem& p, int which, const char* name, const TestTensor& actual, const Values& values,
                    double tolerance) {
  double error = 0, size = 0;
  size_t i = 0;
  for (int b = 0; b < actual.batch; ++b)
    for (int t = 0; t < actual.tokens; ++t)
      for (int h = 0; h < actual.heads; ++h)
        for (int d = 0; d < actual.dim; ++d, ++i) {
          const double value = actual.at(b, t, h, d), difference = value - values.exact[i];
          if (!std::isfinite(value) || (values.size[i] == 0 && value != 0)) error = kInfinity;
          error += difference * difference;
          size += values.size[i] * values.size[i];
        }
  const double relative = size > 0 ? std::sqrt(error / size) : std::sqrt(error);
  worst_seen[static_cast<int>(p.dtype)][which] = std::max(worst_seen[static_cast<int>(p.dtype)][which], relative);
  if (!(relative <= tolerance)) fail(p, std::string(name) + " is off by " + std::to_string(relative));
  if (!actual.gaps_untouched()) fail(p, std::string(name) + ": written beside the tensor");
}

// Compares with the definition, and with itself: on one thread and on each of `thread_counts` threads, each time twice.
// The number of threads may decide how sums are rounded, but which thread is faster may not.
inline void check(const Problem& p, const Kernels& kernels, const std::vector<int>& thread_counts) {
  // Half a unit in the last place of the dtype, random in sign, is 0.29 units of 2^-24, 2^-8, 2^-11; the rest is what
  // probabilities and gradients of scores lose when they are rounded to the dtype on their way into a product.
  constexpr double kOut[] = {1.5e-6, 3.5e-3, 4e-4}, kGrad[] = {4e-6, 8e-3, 1.5e-3}, kLse[] = {2e-6, 4e-6, 2e-6};
  const int dtype = static_cast<int>(p.dtype);
  const Exact exact = define(p);
  std::vector<int> counts = thread_counts;
  counts.insert(counts.begin(), 1);
  for (int num_threads : counts) {
    const std::string on = " on " + std::to_string(num_threads) + (num_threads == 1 ? " thread" : " threads");
    const Results found = compute(p, kernels, num_threads);
    compare(p, 0, ("out" + on).c_str(), found.out, exact.out, kOut[dtype]);
    if (kernels.backward != nullptr) {
      compare(p, 1, ("grad_q" + on).c_str(), found.grad_q, exact.grad_q, kGrad[dtype]);
      compare(p, 2, ("grad_k" + on).c_str(), found.grad_k, exact.grad_k, kGrad[dtype]);
      compare(p, 3, ("grad_v" + on).c_str(), found.grad_v, exact.grad_v, kGrad[dtype]);
      compare(p, 2, ("grad_k_pages" + on).c_str(), found.grad_k_pages, exact.grad_k_pages, kGrad[dtype]);
      compare(p, 3, ("grad_v_pages" + on).c_str(), found.grad_v_pages, exact.grad_v_pages, kGrad[dtype]);
      if (!found.adds_to_pages) fail(p, "gradients of the past are not added to what is there" + on);
    }
    // A rotated key that lies between two numbers of the dtype may become either.
    const double lse_tolerance = p.c.rotated() && p.dtype != DType::float32 ? 10 * kLse[dtype] : kLse[dtype];
    for (size_t i = 0; i < exact.lse.size(); ++i) {
      const double off =
          exact.lse[i] == found.lse[i] ? 0 : std::fabs(found.lse[i] - exact.lse[i]) / (1 + std::fabs(exact.lse[i]));
      worst_seen[dtype][4] = std::max(worst_seen[dtype][4], off);
      if (!(off <= lse_tolerance)) {
        fail(p, "lse[" + std::to_string(i) + "]" + on + " is " + std::to_string(found.lse[i]) + ", not " +
                    std::to_string(exact.lse[i]));
        break;
      }
    }
    if (!found.borders_intact) fail(p, "written beside the workspace" + on);
    if (!(compute(p, kernels, num_threads) == found)) fail(p, "a repeat differs" + on);
  }
}

// Checks every case in every dtype, those left out with more than `most_multiplications` or with what is not among the
// `features` of the kernels, and prints what was seen. Whether all passed.
inline bool check_all(const Kernels& kernels, const std::vector<int>& thread_counts, double most_multiplications,
                      unsigned features = kAllFeatures, const std::vector<Case>& all = cases(),
                      const std::vector<DType>& dtypes = {DType::float32, DType::bfloat16, DType::float16}) {
  int count = 0, left_out = 0, lacking = 0;
  for (const Case& c : all)
    for (DType dtype : dtypes) {
      const Problem problem(c, dtype, ++count);
      if (c.multiplications() > most_multiplications) {
        ++left_out;
        continue;
      }
      if ((c.features() & ~features) != 0) {
        ++lacking;
        continue;
      }
      try {
        check(problem, kernels, thread_counts);
      } catch (const std::exception& error) {
        fail(problem, error.what());
      }
    }
  std::printf("%-10s %10s %10s %10s %10s %10s   worst error against float64\n", "", "out", "grad_q", "grad_k", "grad_v",
              "lse");
  for (int dtype = 0; dtype < 3; ++dtype) {
    std::printf("%-10s", dtype_name(static_cast<DType>(dtype)));
    for (double worst : worst_seen[dtype]) std::printf(" %10.2e", worst);
    std::printf("\n");
  }
  std::printf("%d problems, %d of them too large here, %d with what the kernels lack, %d failures\n", count, left_out,
              lacking, failures);
  return failures == 0;
}

}  // namespace selfforcing::attention_test
