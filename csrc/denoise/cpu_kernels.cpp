// Denoising kernels on the CPU, compiled once per instruction set. All are one or two passes over memory.
#include <float.h>

#include "../simd/elements.h"
#include "../simd/philox.h"
#include "params.h"

namespace selfforcing {
namespace SELFFORCING_ISA {
namespace {

// A run of elements of one plane [H, W]: where it lies.
struct Run {
  int64_t batch, frame, channel, offset, size;
};

template <typename Element>
const typename Element::Storage* at(const ConstLatents& x, const Run& run) {
  return static_cast<const typename Element::Storage*>(x.data) + run.batch * x.batch_stride +
         run.frame * x.frame_stride + run.channel * x.channel_stride + run.offset;
}

template <typename Element>
typename Element::Storage* at(const MutableLatents& x, const Run& run) {
  return static_cast<typename Element::Storage*>(x.data) + run.batch * x.batch_stride + run.frame * x.frame_stride +
         run.channel * x.channel_stride + run.offset;
}

// Calls visit(run) for the runs of elements [begin, end) of the latents in the order [B, F, C, H, W].
template <typename Visit>
SELFFORCING_INLINE void for_runs(const LatentShape& shape, int64_t begin, int64_t end, const Visit& visit) {
  while (begin < end) {
    const int64_t plane = begin / shape.plane, offset = begin % shape.plane;
    const int64_t frame = plane / shape.channels;
    const int64_t rest = shape.plane - offset, size = rest < end - begin ? rest : end - begin;
    visit(Run{frame / shape.frames, frame % shape.frames, plane % shape.channels, offset, size});
    begin += size;
  }
}

// The same over all elements, in ranges that threads share. Ranges begin on multiples of kLanes.
template <typename Visit>
void for_all_runs(const LatentShape& shape, const Parallel& parallel, const Visit& visit) {
  constexpr int64_t kUnit = 64;
  const int64_t elements = static_cast<int64_t>(shape.batch) * shape.frames * shape.channels * shape.plane;
  for_ranges(parallel, (elements + kUnit - 1) / kUnit, kUnit, [&](int64_t begin, int64_t end) {
    end *= kUnit;
    for_runs(shape, begin * kUnit, end < elements ? end : elements, visit);
  });
}

// Calls visit(run, noise) for the run, or for parts of it: noise(i, count) is that of its elements from i on.
template <typename Element, typename Visit>
SELFFORCING_INLINE void with_noise(const ConstLatents& given, const PhiloxNoise& drawn, const LatentShape& shape,
                                   Run run, const Visit& visit) {
  if (given.data != nullptr) {
    const auto* noise = at<Element>(given, run);
    visit(run, [&](int64_t i, int count) __attribute__((always_inline)) { return load<Element>(noise + i, count); });
    return;
  }
  const PhiloxStream stream(drawn, run.batch);
  const int64_t first = (run.frame * shape.channels + run.channel) * shape.plane, end = run.offset + run.size;
  DrawnNormals numbers;
  for (; run.offset < end; run.offset += run.size) {
    run.size = end - run.offset < DrawnNormals::kMost ? end - run.offset : DrawnNormals::kMost;
    const float* noise = numbers.draw(stream, first + run.offset, run.size);
    visit(run, [&](int64_t i, int count) __attribute__((always_inline)) { return load<Float32>(noise + i, count); });
  }
}

// Writes x0 of a run, and calls then(i, count, x0), x0 not rounded, for what follows from it.
template <typename Element, typename Then>
SELFFORCING_INLINE void denoise_run(const DenoiseParams& params, const Run& run, const Then& then) {
  const bool guided = params.flow_uncond.data != nullptr;
  const float sigma = params.sigma.at(run.batch, run.frame), scale = params.guidance_scale;
  const auto* flow = at<Element>(params.flow, run);
  const auto* flow_uncond = guided ? at<Element>(params.flow_uncond, run) : nullptr;
  const auto* x_t = at<Element>(params.x_t, run);
  auto* x0 = at<Element>(params.x0, run);
  for_lanes(run.size, [&](int64_t i, int count) __attribute__((always_inline)) {
    Floats direction = load<Element>(flow + i, count);
    if (guided) {
      const Floats uncond = load<Element>(flow_uncond + i, count);
      direction = uncond + scale * (direction - uncond);
    }
    const Floats clean = load<Element>(x_t + i, count) - sigma * direction;
    store<Element>(x0 + i, clean, count);
    then(i, count, clean);
  });
}

}  // namespace

void denoise(const DenoiseParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    for_all_runs(params.shape, params.parallel, [&](const Run& run) {
      if (params.x_next.data == nullptr)
        return denoise_run<Element>(params, run, [](int64_t, int, Floats) __attribute__((always_inline)) {});
      with_noise<Element>(params.noise, params.drawn, params.shape, run, [&](const Run& part, const auto& noise) {
        const float sigma = params.sigma_next.at(part.batch, part.frame);
        auto* x_next = at<Element>(params.x_next, part);
        denoise_run<Element>(params, part, [&](int64_t i, int count, Floats x0) __attribute__((always_inline)) {
          store<Element>(x_next + i, (1.0f - sigma) * x0 + sigma * noise(i, count), count);
        });
      });
    });
  });
}

void denoise_backward(const DenoiseBackwardParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    using Storage = typename Element::Storage;
    for_all_runs(params.shape, params.parallel, [&](const Run& run) {
      const float sigma = params.sigma.at(run.batch, run.frame);
      const float sigma_next = params.grad_x_next.data != nullptr ? params.sigma_next.at(run.batch, run.frame) : 0.0f;
      const float flow_factor = -sigma * params.guidance_scale;
      const float uncond_factor = -sigma * (1.0f - params.guidance_scale);
      const auto input = [&](const ConstLatents& x) -> const Storage* {
        return x.data != nullptr ? at<Element>(x, run) : nullptr;
      };
      const auto output = [&](const MutableLatents& x) -> Storage* {
        return x.data != nullptr ? at<Element>(x, run) : nullptr;
      };
      const Storage *grad_x0 = input(params.grad_x0), *grad_x_next = input(params.grad_x_next);
      Storage *grad_flow = output(params.grad_flow), *grad_flow_uncond = output(params.grad_flow_uncond);
      Storage *grad_x_t = output(params.grad_x_t), *grad_noise = output(params.grad_noise);
      for_lanes(run.size, [&](int64_t i, int count) __attribute__((always_inline)) {
        Floats clean{};
        if (grad_x0 != nullptr) clean = load<Element>(grad_x0 + i, count);
        if (grad_x_next != nullptr) {
          const Floats next = load<Element>(grad_x_next + i, count);
          clean += (1.0f - sigma_next) * next;
          if (grad_noise != nullptr) store<Element>(grad_noise + i, sigma_next * next, count);
        }
        if (grad_flow != nullptr) store<Element>(grad_flow + i, flow_factor * clean, count);
        if (grad_flow_uncond != nullptr) store<Element>(grad_flow_uncond + i, uncond_factor * clean, count);
        if (grad_x_t != nullptr) store<Element>(grad_x_t + i, clean, count);
      });
    });
  });
}

void add_noise(const AddNoiseParams& params) {
  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    for_all_runs(params.shape, params.parallel, [&](const Run& run) {
      with_noise<Element>(params.noise, params.drawn, params.shape, run, [&](const Run& part, const auto& noise) {
        const float sigma = params.sigma.at(part.batch, part.frame);
        const auto* x0 = at<Element>(params.x0, part);
        auto* y = at<Element>(params.y, part);
        for_lanes(part.size, [&](int64_t i, int count) __attribute__((always_inline)) {
          store<Element>(y + i, (1.0f - sigma) * load<Element>(x0 + i, count) + sigma * noise(i, count), count);
        });
      });
    });
  });
}

namespace {

// Partial sums of |x - real|: one per kChunk elements of a sample, whatever the number of threads.
constexpr int64_t kChunk = 16384;
constexpr int64_t kBlock = 16 * kLanes;  // summed in float32; blocks in double

int64_t sample_elements(const LatentShape& shape) { return shape.frames * int64_t{shape.channels} * shape.plane; }

int64_t sample_chunks(const LatentShape& shape) { return (sample_elements(shape) + kChunk - 1) / kChunk; }

template <typename Element>
SELFFORCING_INLINE Floats real_score(const typename Element::Storage* cond, const typename Element::Storage* uncond,
                                     float scale, int64_t i, int count) {
  const Floats real = load<Element>(cond + i, count);
  return uncond != nullptr ? real + scale * (real - load<Element>(uncond + i, count)) : real;
}

// As torch.nan_to_num: NaN becomes 0, an infinity the largest float32 of its sign.
SELFFORCING_INLINE Floats finite(Floats x) {
  x = x == x ? x : Floats{};
  x = x > FLT_MAX ? broadcast(FLT_MAX) : x;
  return x < -FLT_MAX ? broadcast(-FLT_MAX) : x;
}

}  // namespace

int64_t dmd_gradient_workspace_floats(const DmdGradientParams& params) {
  return params.shape.batch * sample_chunks(params.shape);
}

void dmd_gradient(const DmdGradientParams& params) {
  const int64_t elements = sample_elements(params.shape), chunks = sample_chunks(params.shape);
  Parallel parallel = params.parallel;
  if (params.shape.batch * elements <= kSerialElements) parallel.num_threads = 1;

  with_element(params.shape.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool guided = params.x0_real_uncond.data != nullptr;

    parallel.for_each(params.shape.batch * chunks, [&](int64_t item, int32_t) {
      const int64_t sample = item / chunks, first = item % chunks * kChunk;
      const int64_t last = first + kChunk < elements ? first + kChunk : elements;
      double sum = 0;
      for_runs(params.shape, sample * elements + first, sample * elements + last, [&](const Run& run) {
        const auto* x = at<Element>(params.x, run);
        const auto* cond = at<Element>(params.x0_real_cond, run);
        const auto* uncond = guided ? at<Element>(params.x0_real_uncond, run) : nullptr;
        for (int64_t begin = 0; begin < run.size; begin += kBlock) {
          Floats block{};
          for_lanes(run.size - begin < kBlock ? run.size - begin : kBlock,
                    [&](int64_t i, int count) __attribute__((always_inline)) {
                      block += absolute(load<Element>(x + begin + i, count) -
                                        real_score<Element>(cond, uncond, params.guidance_scale, begin + i, count));
                    });
          sum += sum_lanes(block);
        }
      });
      params.workspace[item] = static_cast<float>(sum);
    });

    parallel.for_each(params.shape.batch * chunks, [&](int64_t item, int32_t) {
      const int64_t sample = item / chunks, first = item % chunks * kChunk;
      const int64_t last = first + kChunk < elements ? first + kChunk : elements;
      double total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += params.workspace[sample * chunks + chunk];
      const float distance = static_cast<float>(total / elements);
      for_runs(params.shape, sample * elements + first, sample * elements + last, [&](const Run& run) {
        const auto* fake = at<Element>(params.x0_fake, run);
        const auto* cond = at<Element>(params.x0_real_cond, run);
        const auto* uncond = guided ? at<Element>(params.x0_real_uncond, run) : nullptr;
        auto* gradient = at<Element>(params.gradient, run);
        for_lanes(run.size, [&](int64_t i, int count) __attribute__((always_inline)) {
          const Floats difference =
              load<Element>(fake + i, count) - real_score<Element>(cond, uncond, params.guidance_scale, i, count);
          store<Element>(gradient + i, finite(difference / distance), count);
        });
      });
    });
  });
}

}  // namespace SELFFORCING_ISA
}  // namespace selfforcing
