// Denoising kernels: one thread takes 16 bytes of every tensor, one pass over memory (two for dmd_gradient).
#include <cfloat>

#include "../ptx/elements.cuh"
#include "../ptx/sums.cuh"
#include "params.h"

namespace selfforcing {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMaxGridRows = 65535;  // CUDA C++ Programming Guide, technical specifications: maximum y of a grid

// One plane [H, W]: where it lies, and where this thread's elements begin in it.
struct Place {
  int64_t batch, frame, channel, offset;
};

template <typename T>
__device__ __forceinline__ const T* at(const ConstLatents& x, const Place& place) {
  return static_cast<const T*>(x.data) + place.batch * x.batch_stride + place.frame * x.frame_stride +
         place.channel * x.channel_stride + place.offset;
}

template <typename T>
__device__ __forceinline__ T* at(const MutableLatents& x, const Place& place) {
  return static_cast<T*>(x.data) + place.batch * x.batch_stride + place.frame * x.frame_stride +
         place.channel * x.channel_stride + place.offset;
}

// Calls visit(place) for this thread's elements of every plane: x of the grid runs over a plane, y over planes.
template <int kWidth, typename Visit>
__device__ __forceinline__ void for_planes(const LatentShape& shape, const Visit& visit) {
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (offset >= shape.plane) return;
  const unsigned planes = static_cast<unsigned>(shape.batch) * shape.frames * shape.channels;
  for (unsigned plane = blockIdx.y; plane < planes; plane += gridDim.y) {
    const unsigned frame = plane / shape.channels;
    visit(Place{frame / shape.frames, frame % shape.frames, plane % shape.channels, offset});
  }
}

// flow_uncond + scale (flow - flow_uncond), or flow.
template <typename T, int kWidth>
__device__ __forceinline__ void guided_flow(const DenoiseParams& params, const Place& place, float (&flow)[kWidth]) {
  ptx::load_elements<T>(at<T>(params.flow, place), flow);
  if (params.flow_uncond.data == nullptr) return;
  float uncond[kWidth];
  ptx::load_elements<T>(at<T>(params.flow_uncond, place), uncond);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) flow[i] = uncond[i] + params.guidance_scale * (flow[i] - uncond[i]);
}

// Where the noise of a call is, or that it is drawn.
enum class NoiseSource { given, drawn };

template <typename T, NoiseSource kSource, int kWidth>
__device__ __forceinline__ void load_noise(const ConstLatents& given, const PhiloxNoise& drawn,
                                           const LatentShape& shape, const Place& place, float (&noise)[kWidth]) {
  if constexpr (kSource == NoiseSource::given) {
    ptx::load_elements<T>(at<T>(given, place), noise);
  } else {
    // Threads that have several elements have whole blocks of them.
    static_assert(kWidth == 1 || kWidth % kPhiloxNumbers == 0);
    const PhiloxStream stream(drawn, place.batch);
    const uint32_t first =
        static_cast<uint32_t>((place.frame * shape.channels + place.channel) * shape.plane + place.offset);
    float numbers[kPhiloxNumbers];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i % kPhiloxNumbers == 0) philox_normals<ScalarMachine>(stream, (first + i) / kPhiloxNumbers, numbers);
      noise[i] = kWidth > 1 ? numbers[i % kPhiloxNumbers] : numbers[first % kPhiloxNumbers];
    }
  }
}

template <typename T, NoiseSource kSource, int kWidth>
__global__ void __launch_bounds__(kThreads) denoise_kernel(const DenoiseParams params) {
  for_planes<kWidth>(params.shape, [&](const Place& place) {
    // All loads come before the first store, which they could not pass.
    const bool step = params.x_next.data != nullptr;
    float flow[kWidth], x[kWidth], noise[kWidth];
    guided_flow<T>(params, place, flow);
    ptx::load_elements<T>(at<T>(params.x_t, place), x);
    if (step) load_noise<T, kSource>(params.noise, params.drawn, params.shape, place, noise);
    const float sigma = params.sigma.at(place.batch, place.frame);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] -= sigma * flow[i];
    ptx::store_elements<T>(at<T>(params.x0, place), x);
    if (!step) return;
    const float sigma_next = params.sigma_next.at(place.batch, place.frame);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = (1.0f - sigma_next) * x[i] + sigma_next * noise[i];
    ptx::store_elements<T>(at<T>(params.x_next, place), x);
  });
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_scaled(const MutableLatents& to, const Place& place, float factor,
                                             const float (&values)[kWidth]) {
  if (to.data == nullptr) return;
  float scaled[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scaled[i] = factor * values[i];
  ptx::store_elements<T>(at<T>(to, place), scaled);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) denoise_backward_kernel(const DenoiseBackwardParams params) {
  for_planes<kWidth>(params.shape, [&](const Place& place) {
    float clean[kWidth] = {};
    if (params.grad_x0.data != nullptr) ptx::load_elements<T>(at<T>(params.grad_x0, place), clean);
    if (params.grad_x_next.data != nullptr) {
      float next[kWidth];
      ptx::load_elements<T>(at<T>(params.grad_x_next, place), next);
      const float sigma_next = params.sigma_next.at(place.batch, place.frame);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) clean[i] += (1.0f - sigma_next) * next[i];
      store_scaled<T>(params.grad_noise, place, sigma_next, next);
    }
    const float sigma = params.sigma.at(place.batch, place.frame);
    store_scaled<T>(params.grad_flow, place, -sigma * params.guidance_scale, clean);
    store_scaled<T>(params.grad_flow_uncond, place, -sigma * (1.0f - params.guidance_scale), clean);
    store_scaled<T>(params.grad_x_t, place, 1.0f, clean);
  });
}

template <typename T, NoiseSource kSource, int kWidth>
__global__ void __launch_bounds__(kThreads) add_noise_kernel(const AddNoiseParams params) {
  for_planes<kWidth>(params.shape, [&](const Place& place) {
    float x[kWidth], noise[kWidth];
    ptx::load_elements<T>(at<T>(params.x0, place), x);
    load_noise<T, kSource>(params.noise, params.drawn, params.shape, place, noise);
    const float sigma = params.sigma.at(place.batch, place.frame);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[i] = (1.0f - sigma) * x[i] + sigma * noise[i];
    ptx::store_elements<T>(at<T>(params.y, place), x);
  });
}

// ---- dmd_gradient: a block takes a chunk of a sample, first to sum |x - real|, then to write the gradient.
constexpr int kChunkVectors = 4;  // accesses per thread and tensor

template <int kWidth>
constexpr uint32_t kChunk = kThreads * kWidth * kChunkVectors;  // elements

// Less than 2^31, as op.cpp has checked.
SELFFORCING_HOST_DEVICE uint32_t sample_elements(const LatentShape& shape) {
  return static_cast<uint32_t>(shape.frames * shape.channels * shape.plane);
}

template <int kWidth>
uint32_t sample_chunks(const LatentShape& shape) {
  return (sample_elements(shape) + kChunk<kWidth> - 1) / kChunk<kWidth>;
}

template <int kWidth, typename Visit>
__device__ __forceinline__ void for_chunk(const LatentShape& shape, const Visit& visit) {
  const uint32_t elements = sample_elements(shape), plane_size = static_cast<uint32_t>(shape.plane);
#pragma unroll
  for (int v = 0; v < kChunkVectors; ++v) {
    const uint32_t element = blockIdx.x * kChunk<kWidth> + (v * kThreads + threadIdx.x) * kWidth;
    if (element >= elements) return;
    const uint32_t plane = element / plane_size;
    visit(Place{blockIdx.y, plane / shape.channels, plane % shape.channels, element - plane * plane_size});
  }
}

// x0_real_cond + scale (x0_real_cond - x0_real_uncond), or x0_real_cond.
template <typename T, int kWidth>
__device__ __forceinline__ void real_score(const DmdGradientParams& params, const Place& place, float (&real)[kWidth]) {
  ptx::load_elements<T>(at<T>(params.x0_real_cond, place), real);
  if (params.x0_real_uncond.data == nullptr) return;
  float uncond[kWidth];
  ptx::load_elements<T>(at<T>(params.x0_real_uncond, place), uncond);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) real[i] += params.guidance_scale * (real[i] - uncond[i]);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) dmd_distance_kernel(const DmdGradientParams params) {
  float sum = 0.0f;
  for_chunk<kWidth>(params.shape, [&](const Place& place) {
    float x[kWidth], real[kWidth];
    ptx::load_elements<T>(at<T>(params.x, place), x);
    real_score<T>(params, place, real);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += fabsf(x[i] - real[i]);
  });
  sum = ptx::block_sum<kThreads>(sum);
  if (threadIdx.x == 0) params.workspace[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// As torch.nan_to_num: NaN becomes 0, an infinity the largest float32 of its sign.
__device__ __forceinline__ float finite(float x) {
  if (x != x) return 0.0f;
  return fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) dmd_gradient_kernel(const DmdGradientParams params) {
  float sum = 0.0f;
  for (unsigned chunk = threadIdx.x; chunk < gridDim.x; chunk += kThreads)
    sum += params.workspace[blockIdx.y * gridDim.x + chunk];
  const float distance = ptx::block_sum<kThreads>(sum) / static_cast<float>(sample_elements(params.shape));
  for_chunk<kWidth>(params.shape, [&](const Place& place) {
    float gradient[kWidth], real[kWidth];
    ptx::load_elements<T>(at<T>(params.x0_fake, place), gradient);
    real_score<T>(params, place, real);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) gradient[i] = finite((gradient[i] - real[i]) / distance);
    ptx::store_elements<T>(at<T>(params.gradient, place), gradient);
  });
}

// ---- Launches

template <typename T, typename Pointer>
bool is_wide(const Latents<Pointer>& x) {
  return ptx::wide_access<T>(x.data, x.batch_stride, x.frame_stride, x.channel_stride);
}

// Calls launch with the number of elements per thread: 16 bytes where every tensor allows it (an absent one does),
// else 1.
template <typename T, typename Launch, typename... Tensors>
int32_t with_width(const LatentShape& shape, const Launch& launch, const Tensors&... tensors) {
  constexpr int kWide = ptx::kVector<T>;
  if (shape.plane % kWide == 0 && (is_wide<T>(tensors) && ...)) return launch(std::integral_constant<int, kWide>{});
  return launch(std::integral_constant<int, 1>{});
}

template <int kWidth>
dim3 plane_grid(const LatentShape& shape) {
  const int64_t planes = static_cast<int64_t>(shape.batch) * shape.frames * shape.channels;
  const int64_t blocks = (shape.plane + kThreads * kWidth - 1) / (kThreads * kWidth);
  return dim3(static_cast<unsigned>(blocks), planes < kMaxGridRows ? static_cast<unsigned>(planes) : kMaxGridRows);
}

}  // namespace

int32_t denoise_cuda(const DenoiseParams& params) {
  return ptx::with_element(params.shape.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width<T>(
        params.shape,
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          const auto kernel = params.x_next.data != nullptr && params.noise.data == nullptr
                                  ? denoise_kernel<T, NoiseSource::drawn, kWidth>
                                  : denoise_kernel<T, NoiseSource::given, kWidth>;
          return ptx::launch(kernel, plane_grid<kWidth>(params.shape), dim3(kThreads), 0, params.stream, params);
        },
        params.flow, params.flow_uncond, params.x_t, params.noise, params.x0, params.x_next);
  });
}

int32_t denoise_backward_cuda(const DenoiseBackwardParams& params) {
  return ptx::with_element(params.shape.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width<T>(
        params.shape,
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          return ptx::launch(denoise_backward_kernel<T, kWidth>, plane_grid<kWidth>(params.shape), dim3(kThreads), 0,
                             params.stream, params);
        },
        params.grad_x0, params.grad_x_next, params.grad_flow, params.grad_flow_uncond, params.grad_x_t,
        params.grad_noise);
  });
}

int32_t add_noise_cuda(const AddNoiseParams& params) {
  return ptx::with_element(params.shape.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width<T>(
        params.shape,
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          const auto kernel = params.noise.data == nullptr ? add_noise_kernel<T, NoiseSource::drawn, kWidth>
                                                           : add_noise_kernel<T, NoiseSource::given, kWidth>;
          return ptx::launch(kernel, plane_grid<kWidth>(params.shape), dim3(kThreads), 0, params.stream, params);
        },
        params.x0, params.noise, params.y);
  });
}

// Enough for the narrow kernel, whose chunks are smaller.
int64_t dmd_gradient_workspace_floats_cuda(const DmdGradientParams& params) {
  return static_cast<int64_t>(params.shape.batch) * sample_chunks<1>(params.shape);
}

int32_t dmd_gradient_cuda(const DmdGradientParams& params) {
  return ptx::with_element(params.shape.dtype, [&](auto element) {
    using T = decltype(element);
    return with_width<T>(
        params.shape,
        [&](auto width) {
          constexpr int kWidth = decltype(width)::value;
          const dim3 grid(static_cast<unsigned>(sample_chunks<kWidth>(params.shape)),
                          static_cast<unsigned>(params.shape.batch));
          const int32_t error =
              ptx::launch(dmd_distance_kernel<T, kWidth>, grid, dim3(kThreads), 0, params.stream, params);
          if (error != 0) return error;
          return ptx::launch(dmd_gradient_kernel<T, kWidth>, grid, dim3(kThreads), 0, params.stream, params);
        },
        params.x, params.x0_fake, params.x0_real_cond, params.x0_real_uncond, params.gradient);
  });
}

}  // namespace selfforcing
