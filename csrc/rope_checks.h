// The checks of calls that rotate, for the ops that do.
#pragma once
#include <string>
#include <vector>

#include "kernel_call.h"
#include "rope/params.h"

namespace selfforcing {

constexpr int64_t kMaxRopeHeadDim = 256;

// Fills all but x and y. `name` is that of x in messages; L is the number of tokens that grid must have.
inline void fill_rope_params(RopeParams& p, const Tensor& x, const char* name, int64_t num_tokens, int64_t num_heads,
                             int64_t head_dim, int64_t head_dim_multiple, const Tensor& start_frame,
                             const std::vector<int64_t>& grid) {
  p.dtype = check_float_dtype(x, name);
  check_last_dim_contiguous(x, name);
  check(head_dim >= head_dim_multiple && head_dim <= kMaxRopeHeadDim && head_dim % head_dim_multiple == 0, name,
        " has head dim ", head_dim, ", but must have a multiple of ", head_dim_multiple, " up to ", kMaxRopeHeadDim);
  check(grid.size() == 3, "grid has ", grid.size(), " sizes, but must have 3: tokens along (frames, rows, columns)");
  for (const int64_t size : grid) check(size >= 0, "grid has a size of ", size, ", but must have none below 0");
  const int64_t frames = size_int32(grid[0], "grid[0]"), rows = size_int32(grid[1], "grid[1]"),
                columns = size_int32(grid[2], "grid[2]");
  check(num_tokens == frames * rows * columns, name, " has ", num_tokens, " tokens, but grid [", frames, ", ", rows,
        ", ", columns, "] has ", frames * rows * columns);
  size_int32(num_tokens, "L");
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

// The memory that the kernels need for cosines and sines: a table on the CPU, none on the GPU.
inline std::optional<Tensor> new_rope_table([[maybe_unused]] RopeParams& p, [[maybe_unused]] const Tensor& x) {
#ifdef SELFFORCING_WITH_CUDA
  return std::nullopt;
#else
  Tensor table = empty_floats<1>({rope_table_floats_cpu(p)}, x);
  p.table = table.mutable_data_ptr<float>();
  return table;
#endif
}

inline void check_norm_weight(const Tensor& weight, const char* name, int64_t channels, const Tensor& x,
                              const char* x_name) {
  check_shape(weight, name, ("[C] like the channels of " + std::string(x_name)).c_str(), {channels});
  check_dtype(weight, name, ScalarType::Float);
  check_same_device(weight, name, x, x_name);
  check_contiguous(weight, name);
}

// All but y, rstd and the table. x [B, L, H * D]; weight float32 [H * D]; start_frame int32 [1] or [B].
inline QkNormRopeParams qk_norm_rope_params(const std::string& op, const Tensor& x, const std::string& x_name,
                                            const Tensor& weight, const Tensor& start_frame, int64_t num_heads,
                                            const std::vector<int64_t>& grid, double eps) {
  const std::string name = op + ": " + x_name, weight_name = op + ": weight";
  check_shape(x, name.c_str(), "[B, L, H * D]", {kAnySize, kAnySize, kAnySize});
  const int64_t channels = x.size(2);
  check(num_heads >= 1 && channels % num_heads == 0, op, ": num_heads is ", num_heads, ", but must divide the ",
        channels, " channels of ", x_name);
  check_norm_weight(weight, weight_name.c_str(), channels, x, x_name.c_str());
  check(eps >= 0, op, ": eps is ", eps, ", but must not be below 0");
  const int64_t head_dim = channels / num_heads;
  QkNormRopeParams p;
  fill_rope_params(p, x, name.c_str(), x.size(1), num_heads, head_dim, 8, start_frame, grid);
  p.x = {x.const_data_ptr(), x.stride(0), x.stride(1), head_dim};
  p.weight = weight.const_data_ptr<float>();
  p.eps = static_cast<float>(eps);
  return p;
}

}  // namespace selfforcing
