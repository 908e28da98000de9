// Keys that are normalised, rotated and written in one pass, for the tests of every kernel: the same bits as the two
// kernels one after the other, which have tests of their own.
#pragma once
#include "kv_cache_problems.h"
#include "rope_problems.h"

namespace selfforcing::norm_rope_write_test {

using namespace kernel_test;

struct Kernels {
  int64_t (*table_floats)(const RopeParams&);  // nullptr: they need no table
  void (*norm_rope)(const QkNormRopeParams&);
  void (*write)(const KVCacheWriteParams&);
  void (*norm_rope_write)(const NormRopeWriteParams&);
};

struct Case {
  rope_test::Case tokens;
  PageFormat format;
  int32_t page_size;
  bool with_offset;                  // of quantised keys
  std::vector<int32_t> write_start;  // of every stream
};

// Pages of keys and values, filled with numbers that say what was not written, and the keys themselves.
struct Result {
  std::vector<unsigned char> k_pages, v_pages;
  std::vector<uint16_t> k_scales, v_scales;
  Buffer y;

  bool operator==(const Result& other) const {
    return k_pages == other.k_pages && v_pages == other.v_pages && k_scales == other.k_scales &&
           v_scales == other.v_scales && y.bytes() == other.y.bytes();
  }
};

// Pages follow each other without gaps; `offset` elements in front of them.
class Problem {
 public:
  Problem(const Case& c, const Kernels& kernels)
      : c_(c),
        kernels_(kernels),
        x_(c.tokens.random()),
        v_(c.tokens.random()),
        weight_(Buffer(DType::float32, c.tokens.features()).fill(0.2f, 1.0f)),
        k_offset_(Buffer(DType::float32, c.tokens.features()).fill()),
        rstd_(DType::float32, c.tokens.tokens()) {
    for (const int32_t start : c.write_start) last_ = start > last_ ? start : last_;
    pages_of_stream_ = (last_ + c.tokens.tokens_of_stream() + c.page_size - 1) / c.page_size;
    num_pages_ = c.tokens.batch * pages_of_stream_;
    for (int64_t i = 0; i < num_pages_; ++i) page_table_.push_back(static_cast<int32_t>(num_pages_ - 1 - i));
  }

  Result run(bool fused, const Parallel& parallel) {
    const rope_test::Case& tokens = c_.tokens;
    const bool quantised = c_.format != PageFormat::elements, int4 = c_.format == PageFormat::int4;
    const int64_t size = quantised ? 1 : element_size(tokens.dtype), row = int4 ? tokens.head_dim / 2 : tokens.head_dim;
    const int64_t elements = num_pages_ * c_.page_size * tokens.num_heads * row;
    const int64_t groups = int4 ? tokens.head_dim / kInt4Group : 1;
    Result result{kv_cache_test::numbered((elements + tokens.offset) * size, 3),
                  kv_cache_test::numbered((elements + tokens.offset) * size, 4),
                  std::vector<uint16_t>(num_pages_ * c_.page_size * tokens.num_heads * groups, 0x1234),
                  {},
                  Buffer(tokens.dtype, tokens.tokens() * tokens.row(), tokens.offset)};
    result.v_scales = result.k_scales;

    NormRopeWriteParams p;
    tokens.describe(p.norm);
    p.norm.x = tokens.heads<const void*>(x_), p.norm.y = tokens.heads<void*>(result.y);
    p.norm.weight = weight_.floats(), p.norm.eps = 1e-6f, p.norm.rstd = rstd_.floats();
    Buffer table = rope_test::table_for(p.norm, kernels_.table_floats);
    KVCacheWriteParams& w = p.write;
    w.format = c_.format, w.dtype = tokens.dtype, w.element_size = element_size(tokens.dtype);
    w.batch = tokens.batch, w.num_tokens = static_cast<int32_t>(tokens.tokens_of_stream());
    w.num_kv_heads = tokens.num_heads, w.head_dim = tokens.head_dim, w.page_size = c_.page_size;
    w.k = tokens.heads<const void*>(result.y), w.v = tokens.heads<const void*>(v_);
    w.k_pages = result.k_pages.data() + tokens.offset * size, w.v_pages = result.v_pages.data() + tokens.offset * size;
    w.k_head_stride = w.v_head_stride = row;
    w.k_token_stride = w.v_token_stride = row * tokens.num_heads;
    w.k_page_stride = w.v_page_stride = w.k_token_stride * c_.page_size;
    w.k_scales = result.k_scales.data(), w.v_scales = result.v_scales.data();
    if (quantised && c_.with_offset) w.k_offset = k_offset_.floats();
    w.page_table = page_table_.data(), w.table_stride = pages_of_stream_, w.write_start = c_.write_start.data();
    p.parallel = p.norm.parallel = w.parallel = parallel;
    if (fused) {
      kernels_.norm_rope_write(p);
    } else {
      kernels_.norm_rope(p.norm);
      kernels_.write(w);
    }
    return result;
  }

 private:
  const Case& c_;
  const Kernels& kernels_;
  Buffer x_, v_, weight_, k_offset_, rstd_;
  int32_t last_ = 0;
  int64_t pages_of_stream_ = 0, num_pages_ = 0;
  std::vector<int32_t> page_table_;
};

// Checks every case on each of `thread_counts` threads.
inline void check_all(const Kernels& kernels, const std::vector<int>& thread_counts) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    const rope_test::Case one{dtype, 1, 3, 64, 2, 3, 4, {5}, 0, 0}, several{dtype, 2, 2, 32, 3, 2, 3, {0, 7}, 0, 0},
        unaligned{dtype, 2, 2, 96, 1, 3, 3, {4}, 6, 1}, wide{dtype, 1, 2, 256, 2, 2, 5, {1}, 0, 0},
        odd{dtype, 2, 3, 40, 1, 4, 5, {2}, 0, 0};
    std::vector<Case> cases;
    for (const PageFormat format : {PageFormat::elements, PageFormat::int8, PageFormat::fp8_e4m3, PageFormat::int4}) {
      cases.push_back({one, format, 5, true, {3}});
      cases.push_back({several, format, 4, false, {0, 11}});
      cases.push_back({unaligned, format, 16, true, {2, 30}});
      cases.push_back({wide, format, 7, false, {6}});
      if (format != PageFormat::int4) cases.push_back({odd, format, 3, true, {0, 1}});
    }
    for (const Case& c : cases) {
      Problem problem(c, kernels);
      const Result expected = problem.run(false, {});
      for (const int num_threads : thread_counts)
        expect(problem.run(true, {num_threads, run_on_threads}) == expected,
               std::string("norm_rope_write into ") + kv_cache_test::format_name(c.format) + ", " + dtype_name(dtype) +
                   ", heads of " + std::to_string(c.tokens.head_dim) + ", " + std::to_string(num_threads) + " threads");
    }
  }
}

}  // namespace selfforcing::norm_rope_write_test
