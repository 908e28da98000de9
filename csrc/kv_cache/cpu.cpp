// Writing a block's keys and values into their pages on the CPU: copies, or calls of the kernels that quantise; and
// keys that are normalised and rotated first, a few tokens at a time.
#include <cstring>

#include "../simd/isa.h"
#include "runs.h"

namespace selfforcing {

SELFFORCING_DECLARE_ISA(void kv_cache_quantise(const KVCacheWriteParams& params, const WriteSide& side,
                                               const WriteRun& run))

namespace {

void copy_run(const KVCacheWriteParams& p, const WriteSide& side, const WriteRun& run) {
  const int64_t element = p.element_size;
  const int64_t head_bytes = p.head_dim * element;
  const char* from = static_cast<const char*>(side.from.data) + run.stream * side.from.batch_stride * element;
  char* to = static_cast<char*>(side.pages) + (run.page * side.page_stride + run.offset * side.token_stride) * element;
  const int64_t token_elements = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  const bool one_head = p.num_kv_heads == 1;
  const bool heads_adjoin = one_head || (side.head_stride == p.head_dim && side.from.head_stride == p.head_dim);
  if (heads_adjoin && side.token_stride == token_elements && side.from.token_stride == token_elements) {
    std::memcpy(to, from + run.begin * token_elements * element, (run.end - run.begin) * token_elements * element);
    return;
  }
  for (int64_t token = run.begin; token < run.end; ++token) {
    const char* source = from + token * side.from.token_stride * element;
    char* target = to + (token - run.begin) * side.token_stride * element;
    if (heads_adjoin) {
      std::memcpy(target, source, token_elements * element);
      continue;
    }
    for (int64_t head = 0; head < p.num_kv_heads; ++head)
      std::memcpy(target + head * side.head_stride * element, source + head * side.from.head_stride * element,
                  head_bytes);
  }
}

void write(const KVCacheWriteParams& p, const WriteSide& side, const WriteRun& run) {
  if (p.format == PageFormat::elements) return copy_run(p, side, run);
  SELFFORCING_DISPATCH(kv_cache_quantise, p, side, run);
}

}  // namespace

void kv_cache_write_cpu(const KVCacheWriteParams& p) {
  for_each_run(p, [&](const WriteSide& side, const WriteRun& run) { write(p, side, run); });
}

void kv_cache_norm_rope_write_cpu(const NormRopeWriteParams& params) {
  QkNormRopeParams norm = params.norm;
  norm.parallel = params.parallel;
  norm.after_context = &params.write;
  norm.after = [](const void* context, int64_t stream, int64_t first, int64_t count) {
    const auto& p = *static_cast<const KVCacheWriteParams*>(context);
    for (int64_t page = 0; page <= (count + p.page_size - 1) / p.page_size; ++page) {
      const WriteRun run = write_run(p, stream, first, first + count, page);
      for (const int64_t side : {0, 1})
        if (run.begin < run.end) write(p, write_side(p, side), run);
    }
  };
  qk_norm_rope_cpu(norm);
}

}  // namespace selfforcing
