// Keys that are normalised, rotated and written into pages, and values that are written, in one pass: a warp takes a
// token.
#include "../ptx/launch.cuh"
#include "../rope/cuda_tokens.cuh"
#include "cuda_tokens.cuh"

namespace selfforcing {
namespace {

// `lanes` of a head and `wide`: for quantise_head.
template <typename T, int kWidth, bool kQuantised>
__global__ void __launch_bounds__(kTokenThreads)
    norm_rope_write_kernel(const NormRopeWriteParams params, int lanes, bool wide) {
  const QkNormRopeParams& norm = params.norm;
  const KVCacheWriteParams& write = params.write;
  const int64_t index = warp_token();
  if (index >= static_cast<int64_t>(write.batch) * write.num_tokens) return;
  const int64_t stream = index / write.num_tokens;
  const int32_t token = static_cast<int32_t>(index - stream * write.num_tokens);
  const PageSlot slot(write, stream, token);
  T* y = token_row<T>(norm.y, stream, token);
  T* page = static_cast<T*>(write.k_pages) + slot.row(write.k_page_stride, write.k_token_stride);
  norm_rope_token<T, kWidth>(norm, stream, token, [&](int32_t head, int32_t d, const float (&values)[kWidth]) {
    ptx::store_elements<T>(y + head * norm.y.head_stride + d, values);
    if constexpr (!kQuantised) ptx::store_elements<T>(page + head * write.k_head_stride + d, values);
  });

  if constexpr (!kQuantised) {
    const T* from = token_row<T>(write.v, stream, token);
    T* to = static_cast<T*>(write.v_pages) + slot.row(write.v_page_stride, write.v_token_stride);
    for_channels<kWidth>(write.num_kv_heads, write.head_dim, [&](int32_t, int32_t head, int32_t d) {
      ptx::copy_elements<kWidth>(to + head * write.v_head_stride + d, from + head * write.v.head_stride + d);
    });
  } else {
    __syncwarp();  // other lanes have stored what is read now
    const int lane = static_cast<int>(threadIdx.x) % ptx::kWarpSize;
    for (int side = 0; side < 2; ++side)
      for (int32_t first = 0; first < write.num_kv_heads; first += ptx::kWarpSize / lanes) {
        const int32_t head = first + lane / lanes;
        const bool exists = head < write.num_kv_heads;
        quantise_head<T>(write, side == 1, slot, stream, token, exists ? head : 0, exists, lane % lanes, lanes, wide);
      }
  }
}

template <typename T, typename Pointer>
bool is_wide(const Heads<Pointer>& x) {
  return ptx::wide_access<T>(x.data, x.batch_stride, x.token_stride, x.head_stride);
}

// Whether 16 bytes may be accessed together everywhere but in quantised pages.
template <typename T>
bool is_wide(const NormRopeWriteParams& params) {
  const QkNormRopeParams& norm = params.norm;
  const KVCacheWriteParams& write = params.write;
  const bool pages =
      write.format != PageFormat::elements ||
      (ptx::wide_access<T>(write.k_pages, write.k_page_stride, write.k_token_stride, write.k_head_stride) &&
       ptx::wide_access<T>(write.v_pages, write.v_page_stride, write.v_token_stride, write.v_head_stride));
  return pages && norm.head_dim % ptx::kVector<T> == 0 && is_wide<T>(norm.x) && is_wide<T>(norm.y) &&
         is_wide<T>(write.v) && ptx::wide_access<float>(norm.weight);
}

template <typename T, int kWidth>
int32_t launch_norm_rope_write(const NormRopeWriteParams& params) {
  const int64_t tokens = static_cast<int64_t>(params.write.batch) * params.write.num_tokens;
  const auto kernel = params.write.format == PageFormat::elements ? norm_rope_write_kernel<T, kWidth, false>
                                                                  : norm_rope_write_kernel<T, kWidth, true>;
  return ptx::launch(kernel, token_grid(tokens), dim3(kTokenThreads), 0, params.stream, params,
                     lanes_of_head(params.write.head_dim), quantises_wide<T>(params.write));
}

}  // namespace

int32_t kv_cache_norm_rope_write_cuda(const NormRopeWriteParams& params) {
  return ptx::with_element(params.norm.dtype, [&](auto element) {
    using T = decltype(element);
    return is_wide<T>(params) ? launch_norm_rope_write<T, ptx::kVector<T>>(params)
                              : launch_norm_rope_write<T, 2>(params);
  });
}

}  // namespace selfforcing
