// The checks of a cache's pages, for the op that writes them and the ops that read them.
#pragma once
#include <utility>

#include "checks.h"
#include "geometry/pages.h"

namespace selfforcing {

// The format that the dtype of `pages` says. `like` is q or k, whose dtype pages have that are not quantised.
inline PageFormat page_format(const std::string& op, const Tensor& pages, const Tensor& like, const char* like_name) {
  if (pages.scalar_type() == like.scalar_type()) return PageFormat::elements;
  switch (pages.scalar_type()) {
    case ScalarType::Char: return PageFormat::int8;
    case ScalarType::Float8_e4m3fn: return PageFormat::fp8_e4m3;
    case ScalarType::Byte: return PageFormat::int4;
    default:
      fail(op, ": k_pages is ", dtype_name(pages.scalar_type()), ", but must be ", dtype_name(like.scalar_type()),
           " like ", like_name, ", or int8, float8_e4m3fn or uint8 (int4)");
  }
}

// k_pages, v_pages [P, page_size, heads, head_dim as stored] of a format, with what quantised pages have besides: the
// scales, bfloat16 [P, page_size, heads, groups], and k_offset, float32 [heads, head_dim], or none.
inline void check_pages(const std::string& op, PageFormat format, const Tensor& k_pages, const Tensor& v_pages,
                        const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                        const std::optional<Tensor>& k_offset, int64_t heads, int64_t head_dim, const Tensor& like,
                        const char* like_name) {
  const bool int4 = format == PageFormat::int4, quantised = format != PageFormat::elements;
  check(!int4 || head_dim % kInt4Group == 0, op, ": ", like_name, " has head dim ", head_dim,
        ", but int4 pages take a multiple of ", kInt4Group);
  const std::string k_name = op + ": k_pages", v_name = op + ": v_pages";
  const int64_t stored_dim = int4 ? head_dim / 2 : head_dim;
  check_shape(k_pages, k_name.c_str(), "[P, page_size, H_kv, D (int4: D / 2)]",
              {kAnySize, kAnySize, heads, stored_dim});
  check_shape(v_pages, v_name.c_str(), "[P, page_size, H_kv, D] like k_pages",
              {k_pages.size(0), k_pages.size(1), heads, stored_dim});
  check(k_pages.size(1) > 0, op, ": page_size is 0, but must be at least 1");
  check_same_dtype(v_pages, v_name.c_str(), k_pages, "k_pages");
  for (const auto& [pages, name] : {std::pair<const Tensor&, const std::string&>{k_pages, k_name}, {v_pages, v_name}}) {
    check_same_device(pages, name.c_str(), like, like_name);
    check_last_dim_contiguous(pages, name.c_str());
  }

  check(k_scales.has_value() == quantised && v_scales.has_value() == quantised, op,
        ": k_scales and v_scales must be given exactly when the pages are quantised, which they are",
        quantised ? "" : " not");
  check(quantised || !k_offset.has_value(), op, ": k_offset is given, but the pages are not quantised");
  if (!quantised) return;
  for (const auto& [scales, name] :
       {std::pair<const Tensor&, std::string>{*k_scales, op + ": k_scales"}, {*v_scales, op + ": v_scales"}}) {
    check_shape(scales, name.c_str(), "[P, page_size, H_kv, groups]",
                {k_pages.size(0), k_pages.size(1), heads, int4 ? head_dim / kInt4Group : 1});
    check_dtype(scales, name.c_str(), ScalarType::BFloat16);
    check_same_device(scales, name.c_str(), like, like_name);
    check_contiguous(scales, name.c_str());
  }
  if (!k_offset.has_value()) return;
  const std::string name = op + ": k_offset";
  check_shape(*k_offset, name.c_str(), "[H_kv, D]", {heads, head_dim});
  check_dtype(*k_offset, name.c_str(), ScalarType::Float);
  check_same_device(*k_offset, name.c_str(), like, like_name);
  check_contiguous(*k_offset, name.c_str());
}

}  // namespace selfforcing
