// Modulation calls, as their kernels see them. Filled by op.cpp, which has checked everything; kernels trust it.
#pragma once
#include "../geometry/host_device.h"
#include "../geometry/parallel.h"
#include "../geometry/tensor.h"

namespace selfforcing {

// [B, L, C] with contiguous channels; strides in elements.
template <typename Pointer>
struct Features {
  Pointer data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;
};

using ConstFeatures = Features<const void*>;
using MutableFeatures = Features<void*>;

// Shift, scale or gate [B, F, C] with contiguous channels; strides in elements.
struct Modulation {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t frame_stride = 0;

  SELFFORCING_HOST_DEVICE const float* row(int64_t batch, int64_t frame) const {
    return data + batch * batch_stride + frame * frame_stride;
  }
};

struct FeatureShape {
  DType dtype = DType::float32;
  int32_t batch = 0;
  int32_t frames = 0;        // F
  int32_t frame_seqlen = 0;  // L = F * frame_seqlen
  int32_t channels = 0;      // C
};

// y = (x - mean) rstd (1 + scale) + shift, mean and rstd over the channels of each token.
struct ModulatedLayerNormParams {
  FeatureShape shape;
  ConstFeatures x;
  MutableFeatures y;
  Modulation shift, scale;
  float eps = 0.0f;
  float* mean = nullptr;  // [B, L], written
  float* rstd = nullptr;  // [B, L], written

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// Gradients of sum(y * grad_y).
struct ModulatedLayerNormBackwardParams {
  FeatureShape shape;
  ConstFeatures grad_y, x;
  Modulation scale;
  const float* mean = nullptr;  // [B, L]
  const float* rstd = nullptr;  // [B, L]
  MutableFeatures grad_x;
  float* grad_shift = nullptr;  // [B, F, C] contiguous
  float* grad_scale = nullptr;  // [B, F, C] contiguous
  float* workspace = nullptr;   // modulated_layer_norm_backward_workspace_floats_*()

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// out = x + y gate.
struct GatedResidualParams {
  FeatureShape shape;
  ConstFeatures x, y;
  MutableFeatures out;
  Modulation gate;

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// Gradients of sum(out * grad_out) to y and gate; that to x is grad_out.
struct GatedResidualBackwardParams {
  FeatureShape shape;
  ConstFeatures grad_out, y;
  Modulation gate;
  MutableFeatures grad_y;
  float* grad_gate = nullptr;  // [B, F, C] contiguous
  float* workspace = nullptr;  // gated_residual_backward_workspace_floats_*()

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA
};

// CPU (csrc/modulate/cpu.cpp).
void modulated_layer_norm_cpu(const ModulatedLayerNormParams& params);
int64_t modulated_layer_norm_backward_workspace_floats_cpu(const FeatureShape& shape);
void modulated_layer_norm_backward_cpu(const ModulatedLayerNormBackwardParams& params);
void gated_residual_cpu(const GatedResidualParams& params);
int64_t gated_residual_backward_workspace_floats_cpu(const FeatureShape& shape);
void gated_residual_backward_cpu(const GatedResidualBackwardParams& params);

// CUDA (csrc/modulate/cuda.cu): launches on params.stream, returns the launch error as cudaError_t (0 is success).
int32_t modulated_layer_norm_cuda(const ModulatedLayerNormParams& params);
int64_t modulated_layer_norm_backward_workspace_floats_cuda(const FeatureShape& shape);
int32_t modulated_layer_norm_backward_cuda(const ModulatedLayerNormBackwardParams& params);
int32_t gated_residual_cuda(const GatedResidualParams& params);
int64_t gated_residual_backward_workspace_floats_cuda(const FeatureShape& shape);
int32_t gated_residual_backward_cuda(const GatedResidualBackwardParams& params);

}  // namespace selfforcing
