// selfforcing::modulated_layer_norm, gated_residual and their backward: checks, allocation, then the params of the
// kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../kernel_call.h"
#include "params.h"

namespace selfforcing {
namespace {

// x [B, L, C] with L a multiple of the F frames of modulation [B, F, C].
FeatureShape feature_shape(const Tensor& x, const char* x_name, const Tensor& modulation, const char* modulation_name) {
  check_shape(x, x_name, "[B, L, C]", {kAnySize, kAnySize, kAnySize});
  check_shape(modulation, modulation_name, "[B, F, C]", {x.size(0), kAnySize, x.size(2)});
  const int64_t tokens = x.size(1), frames = modulation.size(1);
  check(frames > 0 ? tokens % frames == 0 : tokens == 0, x_name, " has ", tokens,
        " tokens, but must have a multiple of the ", frames, " frames of ", modulation_name);
  FeatureShape shape;
  shape.dtype = check_float_dtype(x, x_name);
  check_last_dim_contiguous(x, x_name);
  shape.batch = size_int32(x.size(0), "B");
  shape.frames = size_int32(frames, "F");
  shape.frame_seqlen = size_int32(frames > 0 ? tokens / frames : 0, "L / F");
  shape.channels = size_int32(x.size(2), "C");
  return shape;
}

ConstFeatures features(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

MutableFeatures features(Tensor& tensor) { return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)}; }

// Another [B, L, C] of the call.
ConstFeatures features_like(const Tensor& tensor, const char* name, const Tensor& x, const char* x_name) {
  check_shape(tensor, name, "[B, L, C]", {x.size(0), x.size(1), x.size(2)});
  check_same_dtype(tensor, name, x, x_name);
  check_same_device(tensor, name, x, x_name);
  check_last_dim_contiguous(tensor, name);
  return features(tensor);
}

Modulation modulation(const Tensor& tensor, const char* name, const FeatureShape& shape, const Tensor& x) {
  check_shape(tensor, name, "[B, F, C]", {shape.batch, shape.frames, shape.channels});
  check_dtype(tensor, name, ScalarType::Float);
  check_same_device(tensor, name, x, "x");
  check_last_dim_contiguous(tensor, name);
  return {tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1)};
}

const float* row_statistics(const Tensor& tensor, const char* name, const Tensor& x) {
  check_shape(tensor, name, "[B, L]", {x.size(0), x.size(1)});
  check_dtype(tensor, name, ScalarType::Float);
  check_same_device(tensor, name, x, "x");
  check_contiguous(tensor, name);
  return tensor.const_data_ptr<float>();
}

// Float32, contiguous, on the device of x.
Tensor modulation_gradient(const FeatureShape& shape, const Tensor& x) {
  return empty_floats<3>({shape.batch, shape.frames, shape.channels}, x);
}

// x [B, L, C]; shift, scale float32 [B, F, C]. -> y [B, L, C], mean and rstd float32 [B, L]
std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                        double eps) {
  ModulatedLayerNormParams p;
  p.shape = feature_shape(x, "modulated_layer_norm: x", scale, "modulated_layer_norm: scale");
  p.shift = modulation(shift, "modulated_layer_norm: shift", p.shape, x);
  p.scale = modulation(scale, "modulated_layer_norm: scale", p.shape, x);
  check(eps >= 0, "modulated_layer_norm: eps is ", eps, ", but must not be below 0");
  p.eps = static_cast<float>(eps);
  Tensor y = new_tensor(x.sizes(), x);
  Tensor mean = empty_floats<2>({x.size(0), x.size(1)}, x), rstd = empty_floats<2>({x.size(0), x.size(1)}, x);
  if (x.numel() == 0) return {y, mean, rstd};
  p.x = features(x);
  p.y = features(y);
  p.mean = mean.mutable_data_ptr<float>();
  p.rstd = rstd.mutable_data_ptr<float>();
  run_kernel("modulated_layer_norm", SELFFORCING_KERNEL(modulated_layer_norm), p, x);
  return {y, mean, rstd};
}

// grad_y, x [B, L, C]; scale float32 [B, F, C]; mean, rstd float32 [B, L]. -> grad_x [B, L, C], grad_shift and
// grad_scale float32 [B, F, C]
std::tuple<Tensor, Tensor, Tensor> modulated_layer_norm_backward(const Tensor& grad_y_given, const Tensor& x,
                                                                 const Tensor& scale, const Tensor& mean,
                                                                 const Tensor& rstd) {
  const Tensor grad_y = with_contiguous_last_dim(grad_y_given);
  ModulatedLayerNormBackwardParams p;
  p.shape = feature_shape(x, "modulated_layer_norm_backward: x", scale, "modulated_layer_norm_backward: scale");
  p.x = features(x);
  p.grad_y = features_like(grad_y, "modulated_layer_norm_backward: grad_y", x, "x");
  p.scale = modulation(scale, "modulated_layer_norm_backward: scale", p.shape, x);
  p.mean = row_statistics(mean, "modulated_layer_norm_backward: mean", x);
  p.rstd = row_statistics(rstd, "modulated_layer_norm_backward: rstd", x);
  Tensor grad_x = new_tensor(x.sizes(), x);
  Tensor grad_shift = modulation_gradient(p.shape, x), grad_scale = modulation_gradient(p.shape, x);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_shift), torch::stable::zero_(grad_scale)};
  p.grad_x = features(grad_x);
  p.grad_shift = grad_shift.mutable_data_ptr<float>();
  p.grad_scale = grad_scale.mutable_data_ptr<float>();
  Tensor workspace = empty_floats<1>({SELFFORCING_KERNEL(modulated_layer_norm_backward_workspace_floats)(p.shape)}, x);
  p.workspace = workspace.mutable_data_ptr<float>();
  run_kernel("modulated_layer_norm_backward", SELFFORCING_KERNEL(modulated_layer_norm_backward), p, x);
  return {grad_x, grad_shift, grad_scale};
}

// x, y [B, L, C]; gate float32 [B, F, C]. -> [B, L, C]
Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  GatedResidualParams p;
  p.shape = feature_shape(x, "gated_residual: x", gate, "gated_residual: gate");
  p.x = features(x);
  p.y = features_like(y, "gated_residual: y", x, "x");
  p.gate = modulation(gate, "gated_residual: gate", p.shape, x);
  Tensor out = new_tensor(x.sizes(), x);
  if (x.numel() == 0) return out;
  p.out = features(out);
  run_kernel("gated_residual", SELFFORCING_KERNEL(gated_residual), p, x);
  return out;
}

// grad_out, y [B, L, C]; gate float32 [B, F, C]. -> grad_y [B, L, C], grad_gate float32 [B, F, C]
std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad_out_given, const Tensor& y, const Tensor& gate) {
  const Tensor grad_out = with_contiguous_last_dim(grad_out_given);
  GatedResidualBackwardParams p;
  p.shape = feature_shape(y, "gated_residual_backward: y", gate, "gated_residual_backward: gate");
  p.y = features(y);
  p.grad_out = features_like(grad_out, "gated_residual_backward: grad_out", y, "y");
  p.gate = modulation(gate, "gated_residual_backward: gate", p.shape, y);
  Tensor grad_y = new_tensor(y.sizes(), y);
  Tensor grad_gate = modulation_gradient(p.shape, y);
  if (y.numel() == 0) return {grad_y, torch::stable::zero_(grad_gate)};
  p.grad_y = features(grad_y);
  p.grad_gate = grad_gate.mutable_data_ptr<float>();
  Tensor workspace = empty_floats<1>({SELFFORCING_KERNEL(gated_residual_backward_workspace_floats)(p.shape)}, y);
  p.workspace = workspace.mutable_data_ptr<float>();
  run_kernel("gated_residual_backward", SELFFORCING_KERNEL(gated_residual_backward), p, y);
  return {grad_y, grad_gate};
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("modulated_layer_norm", TORCH_BOX(&selfforcing::modulated_layer_norm));
  m.impl("modulated_layer_norm_backward", TORCH_BOX(&selfforcing::modulated_layer_norm_backward));
  m.impl("gated_residual", TORCH_BOX(&selfforcing::gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&selfforcing::gated_residual_backward));
}
