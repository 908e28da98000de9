// The CUDA kernels of rope, denoise and modulate, emulated, against the CPU kernels, which the Python tests hold to the
// reference: same params, same inputs, aligned to 16 bytes and not, with and without gaps between rows.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/denoise/params.h"
#include "../../csrc/modulate/params.h"
#include "../../csrc/rope/params.h"
#include "emulation.h"

namespace {

using namespace selfforcing;

int passed = 0, failed = 0;
std::string section;  // what is being tested, for messages

void expect(bool right, const std::string& what) {
  right ? ++passed : ++failed;
  if (!right) std::printf("FAILED  %s: %s\n", section.c_str(), what.c_str());
}

// Elements of one dtype in a heap allocation of exactly their size, behind `offset` elements that spoil the alignment.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype), count_(count), offset_(offset), bytes_((count + offset) * size(), 0xff) {}  // NaN

  Buffer& fill(float scale = 1.0f, float shift = 0.0f) {
    static std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count_; ++i) set(i, shift + scale * normal(random));
    return *this;
  }

  void* data() { return bytes_.data() + offset_ * size(); }
  float* floats() { return static_cast<float*>(data()); }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

  float at(int64_t i) const {
    const unsigned char* from = bytes_.data() + (offset_ + i) * size();
    if (dtype_ == DType::float32) return read<float>(from);
    return dtype_ == DType::bfloat16 ? __bfloat162float(read<__nv_bfloat16>(from)) : __half2float(read<__half>(from));
  }
  void set(int64_t i, float value) {
    unsigned char* to = bytes_.data() + (offset_ + i) * size();
    const __nv_bfloat16 b = __float2bfloat16(value);
    const __half h = __float2half(value);
    std::memcpy(to,
                dtype_ == DType::float32    ? static_cast<const void*>(&value)
                : dtype_ == DType::bfloat16 ? &b.bits
                                            : &h.bits,
                size());
  }

 private:
  int64_t size() const { return dtype_ == DType::float32 ? 4 : 2; }
  template <typename T>
  static T read(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }

  DType dtype_;
  int64_t count_, offset_;
  std::vector<unsigned char> bytes_;
};

// An output, once for each side.
struct Output {
  const char* name;
  Buffer cpu, cuda;
  Output(const char* name, DType dtype, int64_t count, int64_t offset = 0)
      : name(name), cpu(dtype, count, offset), cuda(dtype, count, offset) {}
};

// Elements that neither side wrote (gaps) are NaN on both. Two roundings of nearly the same number differ by at most a
// unit in the last place.
void compare(const Output& output) {
  const DType dtype = output.cpu.dtype();
  const double unit = dtype == DType::float32 ? 4e-6 : dtype == DType::bfloat16 ? 0x1p-7 : 0x1p-10;
  double largest = 0;
  for (int64_t i = 0; i < output.cpu.count(); ++i)
    if (std::isfinite(output.cpu.at(i))) largest = std::fmax(largest, std::fabs(output.cpu.at(i)));
  for (int64_t i = 0; i < output.cpu.count(); ++i) {
    const double cpu = output.cpu.at(i), cuda = output.cuda.at(i);
    const double allowed = dtype == DType::float32 ? unit * largest : unit * std::fabs(cpu) + 1e-6 * largest;
    const bool right = std::isnan(cpu) ? std::isnan(cuda) : std::fabs(cpu - cuda) <= allowed;
    if (right) continue;
    expect(false, std::string(output.name) + "[" + std::to_string(i) + "] is " + std::to_string(cuda) +
                      " on CUDA and " + std::to_string(cpu) + " on the CPU");
    return;
  }
  expect(largest > 0, std::string(output.name) + " is not all zero");
}

void expect_launch(int32_t error) { expect(error == 0, "launch error " + std::to_string(error)); }

// ---- denoise

struct LatentCase {
  DType dtype;
  int32_t batch, frames, channels;
  int64_t plane, gap, offset;

  LatentShape shape() const { return {dtype, batch, frames, channels, plane}; }
  int64_t count() const { return batch * frames * channels * (plane + gap); }
  Latents<const void*> input(Buffer& buffer) const { return view<const void*>(buffer); }
  Latents<void*> output(Buffer& buffer) const { return view<void*>(buffer); }
  Buffer random() const { return Buffer(dtype, count(), offset).fill(); }

 private:
  template <typename Pointer>
  Latents<Pointer> view(Buffer& buffer) const {
    const int64_t channel = plane + gap;
    return {buffer.data(), frames * channels * channel, channels * channel, channel};
  }
};

void test_denoise(const LatentCase& c) {
  Buffer flow = c.random(), uncond = c.random(), x_t = c.random(), noise = c.random();
  Buffer sigma = Buffer(DType::float32, c.batch * c.frames).fill(0.2f, 0.5f);
  Buffer sigma_next = Buffer(DType::float32, c.batch * c.frames).fill(0.2f, 0.5f);
  for (const bool guided : {false, true})
    for (const bool next : {false, true}) {
      section = std::string("denoise") + (guided ? ", guided" : "") + (next ? ", next" : "");
      Output x0("x0", c.dtype, c.count(), c.offset), x_next("x_next", c.dtype, c.count(), c.offset);
      DenoiseParams p;
      p.shape = c.shape();
      p.flow = c.input(flow), p.x_t = c.input(x_t);
      p.sigma = {sigma.floats(), c.frames, 1};
      if (guided) p.flow_uncond = c.input(uncond), p.guidance_scale = 3.5f;
      if (next) p.noise = c.input(noise), p.sigma_next = {sigma_next.floats(), c.frames, 1};
      p.x0 = c.output(x0.cpu);
      if (next) p.x_next = c.output(x_next.cpu);
      denoise_cpu(p);
      p.x0 = c.output(x0.cuda);
      if (next) p.x_next = c.output(x_next.cuda);
      expect_launch(denoise_cuda(p));
      compare(x0);
      if (next) compare(x_next);
    }
}

void test_denoise_backward(const LatentCase& c) {
  Buffer grad_x0 = c.random(), grad_x_next = c.random();
  Buffer sigma = Buffer(DType::float32, c.batch * c.frames).fill(0.2f, 0.5f);
  Buffer sigma_next = Buffer(DType::float32, c.batch * c.frames).fill(0.2f, 0.5f);
  for (const bool guided : {false, true})
    for (const int given : {1, 2, 3}) {  // grad_x0, grad_x_next, both
      section = std::string("denoise backward") + (guided ? ", guided" : "") + ", gradients " + std::to_string(given);
      Output flow("grad_flow", c.dtype, c.count(), c.offset), uncond("grad_flow_uncond", c.dtype, c.count(), c.offset);
      Output x_t("grad_x_t", c.dtype, c.count(), c.offset), noise("grad_noise", c.dtype, c.count(), c.offset);
      DenoiseBackwardParams p;
      p.shape = c.shape();
      p.sigma = {sigma.floats(), c.frames, 1};
      if ((given & 1) != 0) p.grad_x0 = c.input(grad_x0);
      if ((given & 2) != 0) p.grad_x_next = c.input(grad_x_next), p.sigma_next = {sigma_next.floats(), c.frames, 1};
      p.guidance_scale = guided ? 3.5f : 1.0f;
      const auto write_to = [&](bool cuda) {
        p.grad_flow = c.output(cuda ? flow.cuda : flow.cpu);
        if (guided) p.grad_flow_uncond = c.output(cuda ? uncond.cuda : uncond.cpu);
        p.grad_x_t = c.output(cuda ? x_t.cuda : x_t.cpu);
        if ((given & 2) != 0) p.grad_noise = c.output(cuda ? noise.cuda : noise.cpu);
      };
      write_to(false);
      denoise_backward_cpu(p);
      write_to(true);
      expect_launch(denoise_backward_cuda(p));
      compare(flow);
      if (guided) compare(uncond);
      compare(x_t);
      if ((given & 2) != 0) compare(noise);
    }
}

void test_add_noise(const LatentCase& c) {
  section = "add_noise";
  Buffer x0 = c.random(), noise = c.random();
  Buffer sigma = Buffer(DType::float32, c.batch * c.frames).fill(0.2f, 0.5f);
  Output y("y", c.dtype, c.count(), c.offset);
  AddNoiseParams p;
  p.shape = c.shape();
  p.x0 = c.input(x0), p.noise = c.input(noise), p.sigma = {sigma.floats(), c.frames, 1};
  p.y = c.output(y.cpu);
  add_noise_cpu(p);
  p.y = c.output(y.cuda);
  expect_launch(add_noise_cuda(p));
  compare(y);
}

void test_dmd_gradient(const LatentCase& c) {
  Buffer x = c.random(), fake = c.random(), cond = c.random(), uncond = c.random();
  for (const bool guided : {false, true}) {
    section = std::string("dmd_gradient") + (guided ? ", guided" : "");
    Output gradient("gradient", c.dtype, c.count(), c.offset);
    DmdGradientParams p;
    p.shape = c.shape();
    p.x = c.input(x), p.x0_fake = c.input(fake), p.x0_real_cond = c.input(cond);
    if (guided) p.x0_real_uncond = c.input(uncond), p.guidance_scale = 3.0f;
    Buffer cpu_space(DType::float32, dmd_gradient_workspace_floats_cpu(p));
    Buffer cuda_space(DType::float32, dmd_gradient_workspace_floats_cuda(p));
    p.gradient = c.output(gradient.cpu), p.workspace = cpu_space.floats();
    dmd_gradient_cpu(p);
    p.gradient = c.output(gradient.cuda), p.workspace = cuda_space.floats();
    expect_launch(dmd_gradient_cuda(p));
    compare(gradient);
  }
}

// ---- modulate

struct FeatureCase {
  DType dtype;
  int32_t batch, frames, frame_seqlen, channels;
  int64_t gap, offset;

  FeatureShape shape() const { return {dtype, batch, frames, frame_seqlen, channels}; }
  int64_t tokens() const { return static_cast<int64_t>(frames) * frame_seqlen; }
  int64_t count() const { return batch * tokens() * (channels + gap); }
  Features<const void*> input(Buffer& buffer) const {
    return {buffer.data(), tokens() * (channels + gap), channels + gap};
  }
  Features<void*> output(Buffer& buffer) const { return {buffer.data(), tokens() * (channels + gap), channels + gap}; }
  Buffer random() const { return Buffer(dtype, count(), offset).fill(1.0f, 0.3f); }
  Buffer random_modulation() const { return Buffer(DType::float32, batch * frames * channels).fill(0.5f); }
  Modulation modulation(Buffer& buffer) const {
    return {buffer.floats(), static_cast<int64_t>(frames) * channels, channels};
  }
};

void test_layer_norm(const FeatureCase& c) {
  section = "modulated_layer_norm";
  Buffer x = c.random(), grad_y = c.random(), shift = c.random_modulation(), scale = c.random_modulation();
  Output y("y", c.dtype, c.count(), c.offset);
  Output mean("mean", DType::float32, c.batch * c.tokens()), rstd("rstd", DType::float32, c.batch * c.tokens());
  ModulatedLayerNormParams p;
  p.shape = c.shape();
  p.x = c.input(x), p.shift = c.modulation(shift), p.scale = c.modulation(scale), p.eps = 1e-6f;
  p.y = c.output(y.cpu), p.mean = mean.cpu.floats(), p.rstd = rstd.cpu.floats();
  modulated_layer_norm_cpu(p);
  p.y = c.output(y.cuda), p.mean = mean.cuda.floats(), p.rstd = rstd.cuda.floats();
  expect_launch(modulated_layer_norm_cuda(p));
  compare(y), compare(mean), compare(rstd);

  section = "modulated_layer_norm_backward";
  const int64_t modulation = c.batch * c.frames * c.channels;
  Output grad_x("grad_x", c.dtype, c.count(), c.offset);
  Output grad_shift("grad_shift", DType::float32, modulation), grad_scale("grad_scale", DType::float32, modulation);
  Buffer cpu_space(DType::float32, modulated_layer_norm_backward_workspace_floats_cpu(c.shape()));
  Buffer cuda_space(DType::float32, modulated_layer_norm_backward_workspace_floats_cuda(c.shape()));
  ModulatedLayerNormBackwardParams b;
  b.shape = c.shape();
  b.grad_y = c.input(grad_y), b.x = c.input(x), b.scale = c.modulation(scale);
  b.mean = mean.cpu.floats(), b.rstd = rstd.cpu.floats();
  b.grad_x = c.output(grad_x.cpu), b.grad_shift = grad_shift.cpu.floats(), b.grad_scale = grad_scale.cpu.floats();
  b.workspace = cpu_space.floats();
  modulated_layer_norm_backward_cpu(b);
  b.grad_x = c.output(grad_x.cuda), b.grad_shift = grad_shift.cuda.floats(), b.grad_scale = grad_scale.cuda.floats();
  b.workspace = cuda_space.floats();
  expect_launch(modulated_layer_norm_backward_cuda(b));
  compare(grad_x), compare(grad_shift), compare(grad_scale);
}

void test_gated_residual(const FeatureCase& c) {
  section = "gated_residual";
  Buffer x = c.random(), y = c.random(), gate = c.random_modulation(), grad_out = c.random();
  Output out("out", c.dtype, c.count(), c.offset);
  GatedResidualParams p;
  p.shape = c.shape();
  p.x = c.input(x), p.y = c.input(y), p.gate = c.modulation(gate);
  p.out = c.output(out.cpu);
  gated_residual_cpu(p);
  p.out = c.output(out.cuda);
  expect_launch(gated_residual_cuda(p));
  compare(out);

  section = "gated_residual_backward";
  Output grad_y("grad_y", c.dtype, c.count(), c.offset);
  Output grad_gate("grad_gate", DType::float32, c.batch * c.frames * c.channels);
  Buffer cpu_space(DType::float32, gated_residual_backward_workspace_floats_cpu(c.shape()));
  Buffer cuda_space(DType::float32, gated_residual_backward_workspace_floats_cuda(c.shape()));
  GatedResidualBackwardParams b;
  b.shape = c.shape();
  b.grad_out = c.input(grad_out), b.y = c.input(y), b.gate = c.modulation(gate);
  b.grad_y = c.output(grad_y.cpu), b.grad_gate = grad_gate.cpu.floats(), b.workspace = cpu_space.floats();
  gated_residual_backward_cpu(b);
  b.grad_y = c.output(grad_y.cuda), b.grad_gate = grad_gate.cuda.floats(), b.workspace = cuda_space.floats();
  expect_launch(gated_residual_backward_cuda(b));
  compare(grad_y), compare(grad_gate);
}

// ---- rope

struct RopeCase {
  DType dtype;
  int32_t batch, num_heads, head_dim, frames, rows, columns, start_frame;
  int64_t gap, offset;

  int64_t tokens() const { return static_cast<int64_t>(frames) * rows * columns; }
  int64_t row() const { return num_heads * head_dim + gap; }
  int64_t count() const { return batch * tokens() * row(); }
  int64_t features() const { return static_cast<int64_t>(num_heads) * head_dim; }
  template <typename Pointer>
  Heads<Pointer> heads(Buffer& buffer) const {
    return {buffer.data(), tokens() * row(), row(), head_dim};
  }
  Buffer random() const { return Buffer(dtype, count(), offset).fill(); }
  void describe(RopeParams& p) const {
    p.dtype = dtype, p.batch = batch, p.num_heads = num_heads, p.head_dim = head_dim;
    p.axes = RopeAxes(frames, rows, columns, head_dim);
    p.start_frame = &start_frame;
  }
};

void test_rope(const RopeCase& c) {
  Buffer x = c.random();
  for (const bool inverse : {false, true}) {
    section = std::string("rope_3d") + (inverse ? ", inverse" : "");
    Output y("y", c.dtype, c.count(), c.offset);
    RopeParams p;
    c.describe(p);
    p.inverse = inverse;
    p.x = c.heads<const void*>(x);
    Buffer cpu_table(DType::float32, rope_table_floats_cpu(p)), cuda_table(DType::float32, rope_table_floats_cuda(p));
    p.table = cpu_table.floats(), p.y = c.heads<void*>(y.cpu);
    rope_3d_cpu(p);
    p.table = cuda_table.floats(), p.y = c.heads<void*>(y.cuda);
    expect_launch(rope_3d_cuda(p));
    compare(y);
  }
}

void test_qk_norm_rope(const RopeCase& c) {
  section = "qk_norm_rope";
  Buffer x = c.random(), grad_y = c.random(), weight = Buffer(DType::float32, c.features()).fill(0.3f, 1.0f);
  Output y("y", c.dtype, c.count(), c.offset), rstd("rstd", DType::float32, c.batch * c.tokens());
  QkNormRopeParams p;
  c.describe(p);
  p.x = c.heads<const void*>(x), p.weight = weight.floats(), p.eps = 1e-6f;
  Buffer cpu_table(DType::float32, rope_table_floats_cpu(p)), cuda_table(DType::float32, rope_table_floats_cuda(p));
  p.table = cpu_table.floats(), p.y = c.heads<void*>(y.cpu), p.rstd = rstd.cpu.floats();
  qk_norm_rope_cpu(p);
  p.table = cuda_table.floats(), p.y = c.heads<void*>(y.cuda), p.rstd = rstd.cuda.floats();
  expect_launch(qk_norm_rope_cuda(p));
  compare(y), compare(rstd);

  section = "qk_norm_rope_backward";
  Output grad_x("grad_x", c.dtype, c.batch * c.tokens() * c.features(), c.offset);
  Output grad_weight("grad_weight", DType::float32, c.features());
  QkNormRopeBackwardParams b;
  c.describe(b);
  b.inverse = true;
  b.x = c.heads<const void*>(grad_y), b.features = c.heads<const void*>(x);
  b.weight = weight.floats(), b.rstd = rstd.cpu.floats();
  Buffer cpu_space(DType::float32, qk_norm_rope_backward_workspace_floats_cpu(b));
  Buffer cuda_space(DType::float32, qk_norm_rope_backward_workspace_floats_cuda(b));
  b.table = cpu_table.floats(), b.workspace = cpu_space.floats();
  b.grad_x = grad_x.cpu.data(), b.grad_weight = grad_weight.cpu.floats();
  qk_norm_rope_backward_cpu(b);
  b.table = cuda_table.floats(), b.workspace = cuda_space.floats();
  b.grad_x = grad_x.cuda.data(), b.grad_weight = grad_weight.cuda.floats();
  expect_launch(qk_norm_rope_backward_cuda(b));
  compare(grad_x), compare(grad_weight);
}

void test_all(DType dtype) {
  for (const LatentCase& c : {LatentCase{dtype, 2, 3, 4, 24, 0, 0}, LatentCase{dtype, 2, 1, 3, 15, 0, 0},
                              LatentCase{dtype, 1, 2, 1, 5000, 8, 0}, LatentCase{dtype, 1, 2, 2, 40, 3, 1}}) {
    test_denoise(c), test_denoise_backward(c), test_add_noise(c), test_dmd_gradient(c);
  }
  for (const FeatureCase& c : {FeatureCase{dtype, 2, 3, 5, 64, 0, 0}, FeatureCase{dtype, 1, 2, 140, 40, 0, 0},
                               FeatureCase{dtype, 2, 1, 3, 99, 0, 0}, FeatureCase{dtype, 1, 2, 9, 1032, 8, 0},
                               FeatureCase{dtype, 1, 2, 4, 32, 3, 1}}) {
    test_layer_norm(c), test_gated_residual(c);
  }
  for (const RopeCase& c : {RopeCase{dtype, 2, 3, 32, 2, 3, 4, 5, 0, 0}, RopeCase{dtype, 1, 2, 40, 3, 2, 2, 0, 0, 0},
                            RopeCase{dtype, 1, 1, 128, 2, 5, 5, 700, 8, 0}, RopeCase{dtype, 2, 2, 8, 1, 3, 2, 1, 3, 1},
                            RopeCase{dtype, 1, 12, 64, 9, 4, 4, 30, 0, 0}}) {
    test_rope(c), test_qk_norm_rope(c);
  }
}

}  // namespace

int main() {
  for (const emulation::Order order : {emulation::Order::forward, emulation::Order::random})
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      emulation::set_order(order);
      try {
        test_all(dtype);
      } catch (const std::exception& error) {
        expect(false, error.what());
      }
    }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
