// Denoising problems for the tests of every kernel, and what the kernels must compute, in float64.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "../denoise/params.h"
#include "elementwise.h"

namespace selfforcing::denoise_test {

using namespace kernel_test;

struct Kernels {
  void (*denoise)(const DenoiseParams&);
  void (*denoise_backward)(const DenoiseBackwardParams&);
  void (*add_noise)(const AddNoiseParams&);
  int64_t (*dmd_gradient_workspace_floats)(const DmdGradientParams&);
  void (*dmd_gradient)(const DmdGradientParams&);
};

// Latents with `gap` elements between planes, `offset` in front.
struct Case {
  DType dtype;
  int32_t batch, frames, channels;
  int64_t plane, gap, offset;

  LatentShape shape() const { return {dtype, batch, frames, channels, plane}; }
  int64_t count() const { return batch * frames * channels * (plane + gap); }
  Latents<const void*> input(Buffer& buffer) const { return view<const void*>(buffer); }
  Latents<void*> output(Output& output) const { return view<void*>(output.actual); }
  Sigmas sigmas(Buffer& buffer) const { return {buffer.floats(), frames, 1}; }
  Buffer random() const { return Buffer(dtype, count(), offset).fill(); }
  Buffer random_sigma() const { return Buffer(DType::float32, batch * frames).fill(0.2f, 0.5f); }
  Output empty(const char* name) const { return Output(name, dtype, count(), offset); }

  // Calls visit(i, level) for every element, level being that of its sigma.
  template <typename Visit>
  void for_elements(const Visit& visit) const {
    for (int64_t row = 0; row < batch * frames * channels; ++row)
      for (int64_t i = 0; i < plane; ++i) visit(row * (plane + gap) + i, row / channels);
  }

 private:
  template <typename Pointer>
  Latents<Pointer> view(Buffer& buffer) const {
    const int64_t channel = plane + gap;
    return {buffer.data(), frames * channels * channel, channels * channel, channel};
  }
};

// Seeds and offsets for every entry of a batch, or for all, and the numbers that kernels must draw with them.
class Draw {
 public:
  Draw(bool own, int32_t batch) : own_(own) {
    for (int64_t b = 0; b < (own ? batch : 1); ++b) {
      seeds_.push_back(-0x123456789abcdef * (b + 1));
      offsets_.push_back(0x300000005 + b);
    }
  }
  PhiloxNoise noise() const { return {seeds_.data(), offsets_.data(), own_, own_, own_ && seeds_.size() > 1}; }
  float number(int64_t batch, int64_t element) const {
    float numbers[kPhiloxNumbers];
    philox_normals<ScalarMachine>({noise(), batch}, static_cast<uint32_t>(element / kPhiloxNumbers), numbers);
    return numbers[element % kPhiloxNumbers];
  }

 private:
  bool own_;
  std::vector<int64_t> seeds_, offsets_;
};

// Where the noise of a call comes from.
enum class Source { given, drawn, drawn_with_own_seeds };
constexpr Source kSources[] = {Source::given, Source::drawn, Source::drawn_with_own_seeds};
constexpr const char* kSourceNames[] = {"", ", drawn", ", drawn with own seeds"};

constexpr float kGuidanceScale = 3.5f;

// The noise of every element, and what the params of a call need to have it.
struct Noise {
  Buffer given;
  Draw draw;
  std::vector<double> exact;

  Noise(const Case& c, Source source)
      : given(c.random()), draw(source == Source::drawn_with_own_seeds, c.batch), exact(c.count(), kNaN) {
    const int64_t sample = c.frames * c.channels * c.plane;
    int64_t element = 0;
    c.for_elements([&](int64_t i, int64_t) {
      exact[i] = source == Source::given ? given.at(i) : draw.number(element / sample, element % sample);
      ++element;
    });
  }
  template <typename Params>
  void set(const Case& c, Source source, Params& p) {
    if (source == Source::given)
      p.noise = c.input(given);
    else
      p.drawn = draw.noise();
  }
};

inline void check_denoise(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  Buffer flow = c.random(), uncond = c.random(), x_t = c.random();
  Buffer sigma = c.random_sigma(), sigma_next = c.random_sigma();
  const auto check_one = [&](bool guided, bool next, Source source) {
    Noise noise(c, source);
    Output x0 = c.empty("x0"), x_next = c.empty("x_next");
    c.for_elements([&](int64_t i, int64_t level) {
      const double direction =
          guided ? uncond.at(i) + double{kGuidanceScale} * (double{flow.at(i)} - uncond.at(i)) : flow.at(i);
      x0.exact[i] = x_t.at(i) - sigma.at(level) * direction;
      x_next.exact[i] = (1.0 - sigma_next.at(level)) * x0.exact[i] + double{sigma_next.at(level)} * noise.exact[i];
    });
    DenoiseParams p;
    p.shape = c.shape();
    p.flow = c.input(flow), p.x_t = c.input(x_t), p.sigma = c.sigmas(sigma);
    p.x0 = c.output(x0);
    std::vector<Output*> outputs{&x0};
    if (guided) p.flow_uncond = c.input(uncond), p.guidance_scale = kGuidanceScale;
    if (next) {
      noise.set(c, source, p);
      p.sigma_next = c.sigmas(sigma_next), p.x_next = c.output(x_next);
      outputs.push_back(&x_next);
    }
    check(std::string(guided ? "guided " : "") + "denoise" + (next ? " with next" : "") +
              kSourceNames[static_cast<int>(source)],
          kernels.denoise, p, outputs, thread_counts);
  };
  for (const bool guided : {false, true}) {
    check_one(guided, false, Source::given);
    for (const Source source : kSources) check_one(guided, true, source);
  }
}

inline void check_denoise_backward(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  Buffer grad_x0 = c.random(), grad_x_next = c.random(), sigma = c.random_sigma(), sigma_next = c.random_sigma();
  for (const bool guided : {false, true})
    for (const bool from_x0 : {false, true})
      for (const bool from_x_next : {false, true}) {
        if (!from_x0 && !from_x_next) continue;
        const double scale = guided ? kGuidanceScale : 1;
        Output flow = c.empty("grad_flow"), uncond = c.empty("grad_flow_uncond"), x_t = c.empty("grad_x_t"),
               noise = c.empty("grad_noise");
        c.for_elements([&](int64_t i, int64_t level) {
          const double next = sigma_next.at(level);
          const double clean = (from_x0 ? grad_x0.at(i) : 0.0) + (from_x_next ? (1 - next) * grad_x_next.at(i) : 0.0);
          flow.exact[i] = -sigma.at(level) * scale * clean;
          uncond.exact[i] = -sigma.at(level) * (1 - scale) * clean;
          x_t.exact[i] = clean;
          noise.exact[i] = next * grad_x_next.at(i);
        });
        DenoiseBackwardParams p;
        p.shape = c.shape();
        p.sigma = c.sigmas(sigma);
        if (from_x0) p.grad_x0 = c.input(grad_x0);
        if (from_x_next) p.grad_x_next = c.input(grad_x_next), p.sigma_next = c.sigmas(sigma_next);
        p.grad_flow = c.output(flow), p.grad_x_t = c.output(x_t);
        std::vector<Output*> outputs{&flow, &x_t};
        if (guided) {
          p.guidance_scale = kGuidanceScale, p.grad_flow_uncond = c.output(uncond);
          outputs.push_back(&uncond);
        }
        if (from_x_next) {
          p.grad_noise = c.output(noise);
          outputs.push_back(&noise);
        }
        check(std::string(guided ? "guided " : "") + "denoise backward" + (from_x0 ? " from x0" : "") +
                  (from_x_next ? " from x_next" : ""),
              kernels.denoise_backward, p, outputs, thread_counts);
      }
}

inline void check_add_noise(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  for (const Source source : kSources) {
    Buffer x0 = c.random(), sigma = c.random_sigma();
    Noise noise(c, source);
    Output y = c.empty("y");
    c.for_elements([&](int64_t i, int64_t level) {
      y.exact[i] = (1.0 - sigma.at(level)) * x0.at(i) + double{sigma.at(level)} * noise.exact[i];
    });
    AddNoiseParams p;
    p.shape = c.shape();
    p.x0 = c.input(x0), p.sigma = c.sigmas(sigma), p.y = c.output(y);
    noise.set(c, source, p);
    check(std::string("add_noise") + kSourceNames[static_cast<int>(source)], kernels.add_noise, p, {&y}, thread_counts);
  }
}

// Drawn numbers of a batch of two, to the bit: the same stand in tests/test_philox.py, where the reference gives them.
constexpr int64_t kDrawnSeed = 0x123456789abcdef, kDrawnOffset = 0x300000005;
constexpr float kDrawn[2][9] = {{-0x1.53c97ep-2f, -0x1.28b994p-1f, 0x1.abaabcp-7f, -0x1.276156p+0f, -0x1.86cc06p-4f,
                                 0x1.411bd6p-1f, 0x1.99db1ap-3f, 0x1.83a39cp+0f, -0x1.306022p-1f},
                                {0x1.9a388p-1f, -0x1.7644e6p-3f, 0x1.a6b896p-5f, 0x1.3112d6p-5f, 0x1.58d052p-1f,
                                 -0x1.b6546ap+0f, 0x1.f7f1c4p-1f, 0x1.cb63fap-1f, 0x1.0ac552p-1f}};

inline void check_drawn_bits(const Kernels& kernels) {
  for (const int64_t plane : {int64_t{9}, int64_t{16}}) {  // one element at a time, and several
    const Case c{DType::float32, 2, 1, 1, plane, 0, 0};
    Buffer x0(DType::float32, c.count()), sigma(DType::float32, c.batch);
    Output y = c.empty("y");
    for (int64_t i = 0; i < c.count(); ++i) x0.set(i, 0.0f);
    for (int64_t i = 0; i < c.batch; ++i) sigma.set(i, 1.0f);
    AddNoiseParams p;
    p.shape = c.shape();
    p.x0 = c.input(x0), p.sigma = c.sigmas(sigma), p.y = c.output(y);
    p.drawn.seeds = &kDrawnSeed, p.drawn.offsets = &kDrawnOffset;
    kernels.add_noise(p);
    for (int entry = 0; entry < 2; ++entry)
      for (int i = 0; i < 9; ++i)
        expect(y.actual.at(entry * plane + i) == kDrawn[entry][i],
               "number " + std::to_string(i) + " of entry " + std::to_string(entry) + " has the bits of the reference");
  }
}

inline void check_dmd_gradient(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  Buffer x = c.random(), fake = c.random(), cond = c.random(), uncond = c.random();
  for (const bool guided : {false, true}) {
    const auto real = [&](int64_t i) {
      return cond.at(i) + (guided ? double{kGuidanceScale} * (double{cond.at(i)} - uncond.at(i)) : 0.0);
    };
    std::vector<double> distance(c.batch);
    c.for_elements([&](int64_t i, int64_t level) { distance[level / c.frames] += std::fabs(x.at(i) - real(i)); });
    Output gradient = c.empty("gradient");
    const double elements = static_cast<double>(c.frames) * c.channels * c.plane;
    c.for_elements([&](int64_t i, int64_t level) {
      gradient.exact[i] = (fake.at(i) - real(i)) / (distance[level / c.frames] / elements);
    });
    DmdGradientParams p;
    p.shape = c.shape();
    p.x = c.input(x), p.x0_fake = c.input(fake), p.x0_real_cond = c.input(cond);
    if (guided) p.x0_real_uncond = c.input(uncond), p.guidance_scale = kGuidanceScale;
    Buffer workspace(DType::float32, kernels.dmd_gradient_workspace_floats(p));
    p.workspace = workspace.floats(), p.gradient = c.output(gradient);
    check(guided ? "guided dmd_gradient" : "dmd_gradient", kernels.dmd_gradient, p, {&gradient}, thread_counts);
  }
}

inline void check_all(const Kernels& kernels, const std::vector<int>& thread_counts) {
  check_drawn_bits(kernels);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Case& c :
         {Case{dtype, 2, 3, 4, 24, 0, 0}, Case{dtype, 2, 1, 3, 15, 0, 0}, Case{dtype, 1, 2, 1, 5000, 8, 0},
          Case{dtype, 1, 2, 2, 40, 3, 1}, Case{dtype, 2, 3, 1, 7000, 0, 0}}) {
      check_denoise(c, kernels, thread_counts), check_denoise_backward(c, kernels, thread_counts);
      check_add_noise(c, kernels, thread_counts), check_dmd_gradient(c, kernels, thread_counts);
    }
}

}  // namespace selfforcing::denoise_test
