// Rotary embedding calls, as their kernels see them. Filled by op.cpp, which has checked everything; kernels trust it.
#pragma once
#include "../geometry/parallel.h"
#include "../geometry/rope_axes.h"
#include "../geometry/tensor.h"

namespace selfforcing {

// y = x with every channel pair rotated by its token's angle (by minus the angle when inverse).
struct RopeParams {
  DType dtype = DType::float32;
  int32_t batch = 0;
  int32_t num_heads = 0;
  int32_t head_dim = 0;                  // D, even, up to 256
  RopeAxes axes;                         // num_tokens() == L
  const int32_t* start_frame = nullptr;  // [num_starts]: position of the first frame, on the op's device
  int32_t num_starts = 1;                // 1, which all streams share, or batch
  float* table = nullptr;  // CPU: rope_table_floats_cpu(), scratch: cosines and sines, filled first, computed in double
  bool inverse = false;

  ConstHeads x;    // [B, L, H, D]; backward of qk_norm_rope: grad_y
  MutableHeads y;  // [B, L, H, D]; unused by that backward

  Parallel parallel;       // CPU
  void* stream = nullptr;  // CUDA

  SELFFORCING_HOST_DEVICE int64_t start_of(int64_t stream) const { return num_starts == 1 ? 0 : stream; }

  // CPU: axes of the table. Its frames are those of every start, one after another.
  SELFFORCING_HOST_DEVICE RopeAxes table_axes() const {
    RopeAxes of_table = axes;
    of_table.size[0] *= num_starts;
    return of_table;
  }
};

// y = rope(x rstd weight), rstd = 1 / sqrt(mean over all H * D channels of x^2 + eps).
struct QkNormRopeParams : RopeParams {
  const float* weight = nullptr;  // [H * D]
  float eps = 0.0f;
  float* rstd = nullptr;  // [B, L], written

  // CPU: called, if set, when tokens [first, first + count) of a stream are in y, which is still in the caches then, by
  // the thread that computed them.
  void (*after)(const void* context, int64_t stream, int64_t first, int64_t count) = nullptr;
  const void* after_context = nullptr;
};

// Gradients of sum(y * grad_y); grad_y is `x` of the base, rotated back by setting inverse.
struct QkNormRopeBackwardParams : RopeParams {
  ConstHeads features;            // the op's input x [B, L, H * D]: head_stride is D
  const float* weight = nullptr;  // [H * D]
  const float* rstd = nullptr;    // [B, L], of the forward
  void* grad_x = nullptr;         // [B, L, H * D] contiguous
  float* grad_weight = nullptr;   // [H * D]
  float* workspace = nullptr;     // qk_norm_rope_backward_workspace_floats_*()
};

// CPU (csrc/rope/cpu.cpp).
int64_t rope_table_floats_cpu(const RopeParams& params);
void rope_3d_cpu(const RopeParams& params);
void qk_norm_rope_cpu(const QkNormRopeParams& params);
int64_t qk_norm_rope_backward_workspace_floats_cpu(const QkNormRopeBackwardParams& params);
void qk_norm_rope_backward_cpu(const QkNormRopeBackwardParams& params);

// CUDA (csrc/rope/cuda.cu): launches on params.stream, returns the launch error as cudaError_t (0 is success).
int32_t rope_3d_cuda(const RopeParams& params);
int32_t qk_norm_rope_cuda(const QkNormRopeParams& params);
int64_t qk_norm_rope_backward_workspace_floats_cuda(const QkNormRopeBackwardParams& params);
int32_t qk_norm_rope_backward_cuda(const QkNormRopeBackwardParams& params);

}  // namespace selfforcing
