// selfforcing::rope_3d, qk_norm_rope and qk_norm_rope_backward: checks, allocation, then the params of the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../kernel_call.h"
#include "params.h"

namespace selfforcing {
namespace {

constexpr int64_t kMaxHeadDim = 256;

// Fills all but x and y. L is the number of tokens that grid must have.
void fill_params(RopeParams& p, const Tensor& x, const char* name, int64_t num_tokens, int64_t num_heads,
                 int64_t head_dim, int64_t head_dim_multiple, const Tensor& start_frame,
                 const std::vector<int64_t>& grid) {
  p.dtype = check_float_dtype(x, name);
  check_last_dim_contiguous(x, name);
  check(head_dim >= head_dim_multiple && head_dim <= kMaxHeadDim && head_dim % head_dim_multiple == 0, name,
        " has head dim ", head_dim, ", but must have a multiple of ", head_dim_multiple, " up to ", kMaxHeadDim);
  check(grid.size() == 3, "grid has ", grid.size(), " sizes, but must have 3: tokens along (frames, rows, columns)");
  for (const int64_t size : grid) check(size >= 0, "grid has a size of ", size, ", but must have none below 0");
  const int64_t frames = size_int32(grid[0], "grid[0]"), rows = size_int32(grid[1], "grid[1]"),
                columns = size_int32(grid[2], "grid[2]");
  check(num_tokens == frames * rows * columns, name, " has ", num_tokens, " tokens, but grid [", frames, ", ", rows,
        ", ", columns, "] has ", frames * rows * columns);
  p.batch = size_int32(x.size(0), "B");
  check(start_frame.dim() == 1 && (start_frame.size(0) == 1 || start_frame.size(0) == p.batch),
        "start_frame has shape ", shape_text(start_frame), ", but must be [1] or [B] = [", p.batch, "]");
  check_index_tensor(start_frame, "start_frame", x, "x");

  p.num_heads = size_int32(num_heads, "num_heads");
  p.head_dim = static_cast<int32_t>(head_dim);
  p.axes = RopeAxes(frames, rows, columns, static_cast<int32_t>(head_dim));
  p.start_frame = start_frame.const_data_ptr<int32_t>();
  p.num_starts = static_cast<int32_t>(start_frame.size(0));
  size_int32(p.num_starts * frames, "the number of all streams' frames");
}

// x [B, L, H, D]; start_frame int32 [1] or [B]; grid (frames, rows, columns). -> [B, L, H, D]
Tensor rope_3d(const Tensor& x, const Tensor& start_frame, const std::vector<int64_t>& grid, bool inverse) {
  check_shape(x, "rope_3d: x", "[B, L, H, D]", {kAnySize, kAnySize, kAnySize, kAnySize});
  RopeParams p;
  fill_params(p, x, "rope_3d: x", x.size(1), x.size(2), x.size(3), 2, start_frame, grid);
  p.inverse = inverse;
  Tensor y = new_tensor(x.sizes(), x);
  if (x.numel() == 0) return y;
  Tensor table = empty_floats<1>({SELFFORCING_KERNEL(rope_table_floats)(p)}, x);
  p.table = table.mutable_data_ptr<float>();
  p.x = const_heads(x);
  p.y = mutable_heads(y);
  run_kernel("rope_3d", SELFFORCING_KERNEL(rope_3d), p, x);
  return y;
}

void check_weight(const Tensor& weight, const char* name, int64_t channels, const Tensor& x) {
  check_shape(weight, name, "[C] like the channels of x", {channels});
  check_dtype(weight, name, ScalarType::Float);
  check_same_device(weight, name, x, "x");
  check_contiguous(weight, name);
}

// x [B, L, H * D]; weight float32 [H * D]; start_frame int32 [1] or [B]. -> y [B, L, H, D], rstd float32 [B, L]
std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& x, const Tensor& weight, const Tensor& start_frame,
                                        int64_t num_heads, const std::vector<int64_t>& grid, double eps) {
  check_shape(x, "qk_norm_rope: x", "[B, L, H * D]", {kAnySize, kAnySize, kAnySize});
  const int64_t channels = x.size(2);
  check(num_heads >= 1 && channels % num_heads == 0, "qk_norm_rope: num_heads is ", num_heads, ", but must divide the ",
        channels, " channels of x");
  check_weight(weight, "qk_norm_rope: weight", channels, x);
  check(eps >= 0, "qk_norm_rope: eps is ", eps, ", but must not be below 0");
  const int64_t head_dim = channels / num_heads;
  QkNormRopeParams p;
  fill_params(p, x, "qk_norm_rope: x", x.size(1), num_heads, head_dim, 8, start_frame, grid);
  const std::array<int64_t, 4> y_size{x.size(0), x.size(1), num_heads, head_dim};
  Tensor y = new_tensor(y_size, x);
  Tensor rstd = empty_floats<2>({x.size(0), x.size(1)}, x);
  if (x.numel() == 0) return {y, rstd};
  Tensor table = empty_floats<1>({SELFFORCING_KERNEL(rope_table_floats)(p)}, x);
  p.table = table.mutable_data_ptr<float>();
  p.x = {x.const_data_ptr(), x.stride(0), x.stride(1), head_dim};
  p.y = mutable_heads(y);
  p.weight = weight.const_data_ptr<float>();
  p.eps = static_cast<float>(eps);
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
  check_weight(weight, "qk_norm_rope_backward: weight", channels, x);
  check_shape(rstd, "qk_norm_rope_backward: rstd", "[B, L]", {x.size(0), x.size(1)});
  check_dtype(rstd, "qk_norm_rope_backward: rstd", ScalarType::Float);
  check_same_device(rstd, "qk_norm_rope_backward: rstd", x, "x");
  check_contiguous(rstd, "qk_norm_rope_backward: rstd");
  QkNormRopeBackwardParams p;
  fill_params(p, x, "qk_norm_rope_backward: x", x.size(1), num_heads, head_dim, 8, start_frame, grid);
  p.inverse = true;
  Tensor grad_x = new_tensor(x.sizes(), x);
  Tensor grad_weight = new_tensor(weight.sizes(), weight);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_weight)};
  Tensor table = empty_floats<1>({SELFFORCING_KERNEL(rope_table_floats)(p)}, x);
  p.table = table.mutable_data_ptr<float>();
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
