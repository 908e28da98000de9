// selfforcing::rope_3d, qk_norm_rope and qk_norm_rope_backward: checks, allocation, then the params of the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../kernel_call.h"
#include "../rope_checks.h"

namespace selfforcing {
namespace {

// x [B, L, H, D]; start_frame int32 [1] or [B]; grid (frames, rows, columns). -> [B, L, H, D]
Tensor rope_3d(const Tensor& x, const Tensor& start_frame, const std::vector<int64_t>& grid, bool inverse) {
  check_shape(x, "rope_3d: x", "[B, L, H, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  RopeParams p;
  fill_rope_params(p, x, "rope_3d: x", x.size(1), x.size(2), x.size(3), 2, start_frame, grid);
  p.inverse = inverse;
  Tensor y = new_tensor(x.sizes(), x);
  if (x.numel() == 0) return y;
  const std::optional<Tensor> table = new_rope_table(p, x);
  p.x = const_heads(x);
  p.y = mutable_heads(y);
  run_kernel("rope_3d", SELFFORCING_KERNEL(rope_3d), p, x);
  return y;
}

// x [B, L, H * D]; weight float32 [H * D]; start_frame int32 [1] or [B]. -> y [B, L, H, D], rstd float32 [B, L]
std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& x, const Tensor& weight, const Tensor& start_frame,
                                        int64_t num_heads, const std::vector<int64_t>& grid, double eps) {
  QkNormRopeParams p = qk_norm_rope_params("qk_norm_rope", x, "x", weight, start_frame, num_heads, grid, eps);
  const std::array<int64_t, 4> y_size{x.size(0), x.size(1), p.num_heads, p.head_dim};
  Tensor y = new_tensor(y_size, x);
  Tensor rstd = empty_floats<2>({x.size(0), x.size(1)}, x);
  if (x.numel() == 0) return {y, rstd};
  const std::optional<Tensor> table = new_rope_table(p, x);
  p.y = mutable_heads(y);
  p.rstd = rstd.mutable_data_ptr<float>();
  run_kernel("qk_norm_rope", SELFFORCING_KERNEL(qk_norm_rope), p, x);
  return {y, rstd};
}

// grad_y [B, L, H, D]; x, weight as above; rstd float32 [B, L]. -> grad_x [B, L, H * D], grad_weight float32 [H * D]
std::tuple<Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_y_given, const Tensor& x, const Tensor& weight,
                                                 const Tensor& rstd, const Tensor& start_frame,
                                                 const std::vector<int64_t>& grid) {
  check_shape(x, "qk_norm_rope_backward: x", "[B, L, H * D]", {kAnySize, kAnySize, kAnySize});
  const int64_t channels = x.size(2);
  check_shape(grad_y_given, "qk_norm_rope_backward: grad_y", "[B, L, H, D]",
              {x.size(0), x.size(1), kAnySize, kAnySize});
  const Tensor grad_y = with_contiguous_last_dim(grad_y_given);
  const int64_t num_heads = grad_y.size(2), head_dim = grad_y.size(3);
  check(num_heads * head_dim == channels, "qk_norm_rope_backward: grad_y has ", num_heads, " heads of ", head_dim,
        ", but x has ", channels, " channels");
  check_same_dtype(grad_y, "qk_norm_rope_backward: grad_y", x, "x");
  check_same_device(grad_y, "qk_norm_rope_backward: grad_y", x, "x");
  check_norm_weight(weight, "qk_norm_rope_backward: weight", channels, x, "x");
  check_shape(rstd, "qk_norm_rope_backward: rstd", "[B, L]", {x.size(0), x.size(1)});
  check_dtype(rstd, "qk_norm_rope_backward: rstd", ScalarType::Float);
  check_same_device(rstd, "qk_norm_rope_backward: rstd", x, "x");
  check_contiguous(rstd, "qk_norm_rope_backward: rstd");
  QkNormRopeBackwardParams p;
  fill_rope_params(p, x, "qk_norm_rope_backward: x", x.size(1), num_heads, head_dim, 8, start_frame, grid);
  p.inverse = true;
  Tensor grad_x = new_tensor(x.sizes(), x);
  Tensor grad_weight = new_tensor(weight.sizes(), weight);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_weight)};
  const std::optional<Tensor> table = new_rope_table(p, x);
  p.x = const_heads(grad_y);
  p.features = {x.const_data_ptr(), x.stride(0), x.stride(1), head_dim};
  p.weight = weight.const_data_ptr<float>();
  p.rstd = rstd.const_data_ptr<float>();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr<float>();
  Tensor workspace = empty_floats<1>({SELFFORCING_KERNEL(qk_norm_rope_backward_workspace_floats)(p)}, x);
  p.workspace = workspace.mutable_data_ptr<float>();
  run_kernel("qk_norm_rope_backward", SELFFORCING_KERNEL(qk_norm_rope_backward), p, x);
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("rope_3d", TORCH_BOX(&selfforcing::rope_3d));
  m.impl("qk_norm_rope", TORCH_BOX(&selfforcing::qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&selfforcing::qk_norm_rope_backward));
}
