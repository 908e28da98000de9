// Denoising calls, as their kernels see them. Filled by op.cpp, which has checked everything; kernels trust it.
#pragma once
#include "../geometry/host_device.h"
#include "../geometry/parallel.h"
#include "../geometry/philox.h"
#include "../geometry/tensor.h"

namespace selfforcing {

// Latents [B, F, C, H, W] with a dense [H, W] plane; strides in elements.
template <typename Pointer>
struct Latents {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t frame_stride = 0;
  int64_t channel_stride = 0;
};

using ConstLatents = Latents<const void*>;
using MutableLatents = Latents<void*>;

// When the channels of every tensor follow each other without gaps, op.cpp says so with one channel of C * H * W
// elements.
struct LatentShape {
  DType dtype = DType::float32;
  int32_t batch = 0;
  int32_t frames = 0;
  int32_t channels = 0;
  int64_t plane = 0;  // H * W
};

// Noise levels [B, F]; strides in elements.
struct Sigmas {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t frame_stride = 0;

  SELFFORCING_HOST_DEVICE float at(int64_t batch, int64_t frame) const {
    return data[batch * batch_stride + frame * frame_stride];
  }
};

// flow = flow_uncond + guidance_scale (flow - flow_uncond) if there is a flow_uncond;
// x0 = x_t - sigma flow; x_next = (1 - sigma_next) x0 + sigma_next noise, of the unrounded x0. Every operation is
// rounded by itself, to float32: all kernels give the bits of the reference (but for bfloat16 results below 2^-126,
// which the instruction of AVX512-BF16 takes for 0).
struct DenoiseParams {
  LatentShape shape;
  ConstLatents flow, flow_uncond, x_t;  // flow_uncond.data nullptr: no guidance
  MutableLatents x0, x_next;            // x_next.data nullptr: not asked for, noise and sigma_next unused
  ConstLatents noise;                   // data nullptr: drawn, in float32
  PhiloxNoise drawn;
  Sigmas sigma, sigma_next;
  float guidance_scale = 1.0f;

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// Gradients of sum(x0 * grad_x0) + sum(x_next * grad_x_next). A gradient with data nullptr is not asked for.
struct DenoiseBackwardParams {
  LatentShape shape;
  ConstLatents grad_x0, grad_x_next;                                 // data nullptr: zero (one of them is there)
  MutableLatents grad_flow, grad_flow_uncond, grad_x_t, grad_noise;  // grad_noise only with grad_x_next
  Sigmas sigma, sigma_next;                                          // sigma_next is there with grad_x_next
  float guidance_scale = 1.0f;                                       // 1 without guidance

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// y = (1 - sigma) x0 + sigma noise, with the same bits everywhere.
struct AddNoiseParams {
  LatentShape shape;
  ConstLatents x0;
  ConstLatents noise;  // data nullptr: drawn, in float32
  PhiloxNoise drawn;
  MutableLatents y;
  Sigmas sigma;

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// real = real_cond + guidance_scale (real_cond - real_uncond); gradient = (fake - real) / mean |x - real|, the mean per
// sample; non-finite values become 0 (NaN) or the largest float32 of their sign.
struct DmdGradientParams {
  LatentShape shape;
  ConstLatents x, x0_fake, x0_real_cond, x0_real_uncond;  // x0_real_uncond.data nullptr: no guidance
  MutableLatents gradient;
  float guidance_scale = 0.0f;
  float* workspace = nullptr;  // dmd_gradient_workspace_floats_*(): partial sums of |x - real|

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// CPU (csrc/denoise/cpu.cpp).
void denoise_cpu(const DenoiseParams& params);
void denoise_backward_cpu(const DenoiseBackwardParams& params);
void add_noise_cpu(const AddNoiseParams& params);
int64_t dmd_gradient_workspace_floats_cpu(const DmdGradientParams& params);
void dmd_gradient_cpu(const DmdGradientParams& params);

// CUDA (csrc/denoise/cuda.cu): launches on params.stream, returns the launch error as cudaError_t (0 is success).
int32_t denoise_cuda(const DenoiseParams& params);
int32_t denoise_backward_cuda(const DenoiseBackwardParams& params);
int32_t add_noise_cuda(const AddNoiseParams& params);
int64_t dmd_gradient_workspace_floats_cuda(const DmdGradientParams& params);
int32_t dmd_gradient_cuda(const DmdGradientParams& params);

}  // namespace selfforcing
