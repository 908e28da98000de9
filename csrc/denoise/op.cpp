// selfforcing::denoise_x0, denoise_step, denoise_backward, add_noise and dmd_gradient: checks, allocation, then the
// params of the kernels.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "../kernel_call.h"
#include "params.h"

namespace selfforcing {
namespace {

// Latents [B, F, C, H, W] of one call: equal shapes, dtypes and devices, and each plane [H, W] dense (copied if not).
class LatentArguments {
 public:
  LatentArguments(const char* op, const Tensor& first, const char* name) : op_(op), first_name_(name) {
    const std::string full = op_ + ": " + name;
    check_shape(first, full.c_str(), "[B, F, C, H, W]", {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize});
    shape_.dtype = check_float_dtype(first, full.c_str());
    shape_.batch = size_int32(first.size(0), "B");
    shape_.frames = size_int32(first.size(1), "F");
    shape_.channels = size_int32(first.size(2), "C");
    shape_.plane = first.size(3) * first.size(4);
    size_int32(shape_.frames * shape_.channels * shape_.plane, "F * C * H * W");
    size_int32(first.size(0) * first.size(1) * first.size(2), "B * F * C");
    tensors_.reserve(kMaxTensors);
    tensors_.push_back(with_dense_planes(first));
  }

  // Tensors as kernels see them, in the order of the calls to add; the first is that of the constructor.
  const Tensor& first() const { return tensors_.front(); }
  const Tensor& add(const Tensor& tensor, const char* name) {
    const std::string full = op_ + ": " + name;
    check_shape(tensor, full.c_str(), "[B, F, C, H, W]",
                {first().size(0), first().size(1), first().size(2), first().size(3), first().size(4)});
    check_same_dtype(tensor, full.c_str(), first(), first_name_);
    check_same_device(tensor, full.c_str(), first(), first_name_);
    tensors_.push_back(with_dense_planes(tensor));
    return tensors_.back();
  }

  Sigmas sigmas(const Tensor& sigma, const char* name) const {
    const std::string full = op_ + ": " + name;
    check_shape(sigma, full.c_str(), "[B, F]", {shape_.batch, shape_.frames});
    check_dtype(sigma, full.c_str(), ScalarType::Float);
    check_same_device(sigma, full.c_str(), first(), first_name_);
    return {sigma.const_data_ptr<float>(), sigma.stride(0), sigma.stride(1)};
  }

  // seed and offset of noise that is drawn: int64 [1] or [B].
  PhiloxNoise drawn(const Tensor& seed, const Tensor& offset) const {
    PhiloxNoise noise;
    std::tie(noise.seeds, noise.seed_stride) = number_per_entry(seed, "seed");
    std::tie(noise.offsets, noise.offset_stride) = number_per_entry(offset, "offset");
    noise.own_seeds = seed.size(0) > 1;
    return noise;
  }

  bool empty() const { return first().numel() == 0; }

  // Contiguous, for an output.
  Tensor output() const { return new_tensor(first().sizes(), first()); }

  // To be called when all are there.
  LatentShape shape() const {
    for (const Tensor& tensor : tensors_)
      if (shape_.channels > 1 && tensor.stride(2) != shape_.plane) return shape_;
    LatentShape merged = shape_;
    merged.channels = 1;
    merged.plane *= shape_.channels;
    return merged;
  }

 private:
  std::tuple<const int64_t*, int64_t> number_per_entry(const Tensor& numbers, const char* name) const {
    const std::string full = op_ + ": " + name;
    const bool shared = numbers.dim() == 1 && numbers.size(0) == 1;
    check_shape(numbers, full.c_str(), "[1] or [B]", {shared ? 1 : shape_.batch});
    check_dtype(numbers, full.c_str(), ScalarType::Long);
    check_same_device(numbers, full.c_str(), first(), first_name_);
    return {numbers.const_data_ptr<int64_t>(), shared ? 0 : numbers.stride(0)};
  }

  static constexpr size_t kMaxTensors = 4;  // of any op: references from add stay valid

  static Tensor with_dense_planes(const Tensor& tensor) {
    const int64_t height = tensor.size(3), width = tensor.size(4);
    const bool dense = (width <= 1 || tensor.stride(4) == 1) && (height <= 1 || tensor.stride(3) == width);
    return dense ? tensor : torch::stable::contiguous(tensor);
  }

  std::string op_;
  const char* first_name_;
  LatentShape shape_;
  std::vector<Tensor> tensors_;
};

ConstLatents const_latents(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

MutableLatents mutable_latents(Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void set_flow(DenoiseParams& p, LatentArguments& latents, const Tensor& flow, const std::optional<Tensor>& flow_uncond,
              double guidance_scale) {
  p.flow = const_latents(latents.add(flow, "flow"));
  if (flow_uncond.has_value()) p.flow_uncond = const_latents(latents.add(*flow_uncond, "flow_uncond"));
  p.guidance_scale = static_cast<float>(guidance_scale);
}

// flow, flow_uncond, x_t [B, F, C, H, W]; sigma float32 [B, F]. -> x0 [B, F, C, H, W]
Tensor denoise_x0(const Tensor& flow, const std::optional<Tensor>& flow_uncond, const Tensor& x_t, const Tensor& sigma,
                  double guidance_scale) {
  LatentArguments latents("denoise_x0", x_t, "x_t");
  DenoiseParams p;
  p.x_t = const_latents(latents.first());
  set_flow(p, latents, flow, flow_uncond, guidance_scale);
  p.sigma = latents.sigmas(sigma, "sigma");
  p.shape = latents.shape();
  Tensor x0 = latents.output();
  if (latents.empty()) return x0;
  p.x0 = mutable_latents(x0);
  run_kernel("denoise_x0", SELFFORCING_KERNEL(denoise), p, x_t);
  return x0;
}

// Fills the noise of an op: given, or drawn with seed and offset.
template <typename Params>
void set_noise(Params& p, LatentArguments& latents, const char* op, const std::optional<Tensor>& noise,
               const std::optional<Tensor>& seed, const std::optional<Tensor>& offset) {
  check(noise.has_value() != seed.has_value() && seed.has_value() == offset.has_value(), op,
        ": either noise or seed and offset must be given");
  if (noise.has_value())
    p.noise = const_latents(latents.add(*noise, "noise"));
  else
    p.drawn = latents.drawn(*seed, *offset);
}

// The same with sigma_next float32 [B, F] and noise [B, F, C, H, W], or seed and offset int64 [1] or [B] to draw it
// with. -> x0, x_next [B, F, C, H, W]
std::tuple<Tensor, Tensor> denoise_step(const Tensor& flow, const std::optional<Tensor>& flow_uncond, const Tensor& x_t,
                                        const Tensor& sigma, const Tensor& sigma_next,
                                        const std::optional<Tensor>& noise, const std::optional<Tensor>& seed,
                                        const std::optional<Tensor>& offset, double guidance_scale) {
  LatentArguments latents("denoise_step", x_t, "x_t");
  DenoiseParams p;
  p.x_t = const_latents(latents.first());
  set_flow(p, latents, flow, flow_uncond, guidance_scale);
  set_noise(p, latents, "denoise_step", noise, seed, offset);
  p.sigma = latents.sigmas(sigma, "sigma");
  p.sigma_next = latents.sigmas(sigma_next, "sigma_next");
  p.shape = latents.shape();
  Tensor x0 = latents.output(), x_next = latents.output();
  if (latents.empty()) return {x0, x_next};
  p.x0 = mutable_latents(x0);
  p.x_next = mutable_latents(x_next);
  run_kernel("denoise_step", SELFFORCING_KERNEL(denoise), p, x_t);
  return {x0, x_next};
}

// grad_x0, grad_x_next [B, F, C, H, W], at least one; sigma, sigma_next float32 [B, F]. -> grad_flow, grad_flow_uncond,
// grad_x_t, grad_noise: [B, F, C, H, W] where needed, else [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> denoise_backward(const std::optional<Tensor>& grad_x0,
                                                            const std::optional<Tensor>& grad_x_next,
                                                            const Tensor& sigma,
                                                            const std::optional<Tensor>& sigma_next,
                                                            double guidance_scale, bool needs_flow,
                                                            bool needs_flow_uncond, bool needs_x_t, bool needs_noise) {
  check(grad_x0.has_value() || grad_x_next.has_value(),
        "denoise_backward: grad_x0 and grad_x_next are both None, but one of them must be given");
  check(!grad_x_next.has_value() || sigma_next.has_value(),
        "denoise_backward: sigma_next is None, but must be given with grad_x_next");
  check(!needs_noise || grad_x_next.has_value(),
        "denoise_backward: needs_noise is true, but noise has no gradient without grad_x_next");
  LatentArguments latents("denoise_backward", grad_x0.has_value() ? *grad_x0 : *grad_x_next,
                          grad_x0.has_value() ? "grad_x0" : "grad_x_next");
  DenoiseBackwardParams p;
  if (grad_x0.has_value()) p.grad_x0 = const_latents(latents.first());
  if (grad_x_next.has_value()) {
    p.grad_x_next = const_latents(grad_x0.has_value() ? latents.add(*grad_x_next, "grad_x_next") : latents.first());
    p.sigma_next = latents.sigmas(*sigma_next, "sigma_next");
  }
  p.sigma = latents.sigmas(sigma, "sigma");
  p.guidance_scale = static_cast<float>(guidance_scale);
  p.shape = latents.shape();
  const auto output = [&](bool needed, MutableLatents& gradient) {
    Tensor tensor = needed ? latents.output() : new_tensor(std::array<int64_t, 1>{0}, latents.first());
    if (needed) gradient = mutable_latents(tensor);
    return tensor;
  };
  const Tensor grad_flow = output(needs_flow, p.grad_flow);
  const Tensor grad_flow_uncond = output(needs_flow_uncond, p.grad_flow_uncond);
  const Tensor grad_x_t = output(needs_x_t, p.grad_x_t);
  const Tensor grad_noise = output(needs_noise, p.grad_noise);
  if (!latents.empty()) run_kernel("denoise_backward", SELFFORCING_KERNEL(denoise_backward), p, latents.first());
  return {grad_flow, grad_flow_uncond, grad_x_t, grad_noise};
}

// x0, noise [B, F, C, H, W], or seed and offset as in denoise_step; sigma float32 [B, F]. -> x_t [B, F, C, H, W]
Tensor add_noise(const Tensor& x0, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed,
                 const std::optional<Tensor>& offset, const Tensor& sigma) {
  LatentArguments latents("add_noise", x0, "x0");
  AddNoiseParams p;
  p.x0 = const_latents(latents.first());
  set_noise(p, latents, "add_noise", noise, seed, offset);
  p.sigma = latents.sigmas(sigma, "sigma");
  p.shape = latents.shape();
  Tensor y = latents.output();
  if (latents.empty()) return y;
  p.y = mutable_latents(y);
  run_kernel("add_noise", SELFFORCING_KERNEL(add_noise), p, x0);
  return y;
}

// x, x0_fake, x0_real_cond, x0_real_uncond [B, F, C, H, W]. -> gradient [B, F, C, H, W]
Tensor dmd_gradient(const Tensor& x, const Tensor& x0_fake, const Tensor& x0_real_cond,
                    const std::optional<Tensor>& x0_real_uncond, double guidance_scale) {
  LatentArguments latents("dmd_gradient", x, "x");
  DmdGradientParams p;
  p.x = const_latents(latents.first());
  p.x0_fake = const_latents(latents.add(x0_fake, "x0_fake"));
  p.x0_real_cond = const_latents(latents.add(x0_real_cond, "x0_real_cond"));
  if (x0_real_uncond.has_value()) p.x0_real_uncond = const_latents(latents.add(*x0_real_uncond, "x0_real_uncond"));
  p.guidance_scale = static_cast<float>(guidance_scale);
  p.shape = latents.shape();
  Tensor gradient = latents.output();
  if (latents.empty()) return gradient;
  p.gradient = mutable_latents(gradient);
  Tensor workspace = empty_floats<1>({SELFFORCING_KERNEL(dmd_gradient_workspace_floats)(p)}, x);
  p.workspace = workspace.mutable_data_ptr<float>();
  run_kernel("dmd_gradient", SELFFORCING_KERNEL(dmd_gradient), p, x);
  return gradient;
}

}  // namespace
}  // namespace selfforcing

STABLE_TORCH_LIBRARY_IMPL(selfforcing, SELFFORCING_DISPATCH_KEY, m) {
  m.impl("denoise_x0", TORCH_BOX(&selfforcing::denoise_x0));
  m.impl("denoise_step", TORCH_BOX(&selfforcing::denoise_step));
  m.impl("denoise_backward", TORCH_BOX(&selfforcing::denoise_backward));
  m.impl("add_noise", TORCH_BOX(&selfforcing::add_noise));
  m.impl("dmd_gradient", TORCH_BOX(&selfforcing::dmd_gradient));
}
