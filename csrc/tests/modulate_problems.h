// Modulation problems for the tests of every kernel, and what the kernels must compute, in float64.
#pragma once
#include <cmath>
#include <vector>

#include "../modulate/params.h"
#include "elementwise.h"

namespace selfforcing::modulate_test {

using namespace kernel_test;

struct Kernels {
  void (*layer_norm)(const ModulatedLayerNormParams&);
  int64_t (*layer_norm_backward_workspace_floats)(const FeatureShape&);
  void (*layer_norm_backward)(const ModulatedLayerNormBackwardParams&);
  void (*gated_residual)(const GatedResidualParams&);
  int64_t (*gated_residual_backward_workspace_floats)(const FeatureShape&);
  void (*gated_residual_backward)(const GatedResidualBackwardParams&);
};

// Features with `gap` elements between tokens, `offset` in front.
struct Case {
  DType dtype;
  int32_t batch, frames, frame_seqlen, channels;
  int64_t gap, offset;

  FeatureShape shape() const { return {dtype, batch, frames, frame_seqlen, channels}; }
  int64_t tokens() const { return static_cast<int64_t>(batch) * frames * frame_seqlen; }
  int64_t row() const { return channels + gap; }
  int64_t modulation_count() const { return static_cast<int64_t>(batch) * frames * channels; }
  Features<const void*> input(Buffer& buffer) const {
    return {buffer.data(), static_cast<int64_t>(frames) * frame_seqlen * row(), row()};
  }
  Features<void*> output(Output& output) const {
    return {output.actual.data(), static_cast<int64_t>(frames) * frame_seqlen * row(), row()};
  }
  Modulation modulation(Buffer& buffer) const {
    return {buffer.floats(), static_cast<int64_t>(frames) * channels, channels};
  }
  Buffer random() const { return Buffer(dtype, tokens() * row(), offset).fill(1.0f, 0.3f); }
  Buffer random_modulation() const { return Buffer(DType::float32, modulation_count()).fill(0.5f); }
  Output empty(const char* name) const { return Output(name, dtype, tokens() * row(), offset); }
  Output sums(const char* name) const {
    Output output(name, DType::float32, modulation_count());
    output.exact.assign(modulation_count(), 0);
    return output;
  }
  // Where the modulation of a token starts.
  int64_t modulation_of(int64_t token) const { return token / frame_seqlen * channels; }
};

inline void check_layer_norm(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  constexpr float kEps = 1e-6f;
  Buffer x = c.random(), grad_y = c.random(), shift = c.random_modulation(), scale = c.random_modulation();
  Output y = c.empty("y"), mean("mean", DType::float32, c.tokens()), rstd("rstd", DType::float32, c.tokens());
  Output grad_x = c.empty("grad_x"), grad_shift = c.sums("grad_shift"), grad_scale = c.sums("grad_scale");
  for (int64_t token = 0; token < c.tokens(); ++token) {
    const int64_t row = token * c.row(), modulation = c.modulation_of(token);
    double sum = 0, squares = 0, grad_sum = 0, grad_product = 0;
    for (int32_t i = 0; i < c.channels; ++i) sum += x.at(row + i);
    const double center = sum / c.channels;
    for (int32_t i = 0; i < c.channels; ++i) squares += (x.at(row + i) - center) * (x.at(row + i) - center);
    const double factor = 1 / std::sqrt(squares / c.channels + kEps);
    mean.exact[token] = center, rstd.exact[token] = factor;
    for (int32_t i = 0; i < c.channels; ++i) {
      const double normal = (x.at(row + i) - center) * factor, gain = 1.0 + scale.at(modulation + i);
      y.exact[row + i] = normal * gain + shift.at(modulation + i);
      grad_shift.exact[modulation + i] += grad_y.at(row + i);
      grad_scale.exact[modulation + i] += grad_y.at(row + i) * normal;
      grad_sum += grad_y.at(row + i) * gain;
      grad_product += grad_y.at(row + i) * gain * normal;
    }
    for (int32_t i = 0; i < c.channels; ++i) {
      const double normal = (x.at(row + i) - center) * factor, gain = 1.0 + scale.at(modulation + i);
      grad_x.exact[row + i] =
          factor * (grad_y.at(row + i) * gain - grad_sum / c.channels - normal * grad_product / c.channels);
    }
  }
  ModulatedLayerNormParams p;
  p.shape = c.shape();
  p.x = c.input(x), p.shift = c.modulation(shift), p.scale = c.modulation(scale), p.eps = kEps;
  p.y = c.output(y), p.mean = mean.actual.floats(), p.rstd = rstd.actual.floats();
  check("modulated_layer_norm", kernels.layer_norm, p, {&y, &mean, &rstd}, thread_counts);

  Buffer workspace(DType::float32, kernels.layer_norm_backward_workspace_floats(c.shape()));
  ModulatedLayerNormBackwardParams b;
  b.shape = c.shape();
  b.grad_y = c.input(grad_y), b.x = c.input(x), b.scale = c.modulation(scale);
  b.mean = mean.actual.floats(), b.rstd = rstd.actual.floats(), b.workspace = workspace.floats();
  b.grad_x = c.output(grad_x);
  b.grad_shift = grad_shift.actual.floats(), b.grad_scale = grad_scale.actual.floats();
  check("modulated_layer_norm backward", kernels.layer_norm_backward, b, {&grad_x, &grad_shift, &grad_scale},
        thread_counts);
}

inline void check_gated_residual(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  Buffer x = c.random(), y = c.random(), gate = c.random_modulation(), grad_out = c.random();
  Output out = c.empty("out"), grad_y = c.empty("grad_y"), grad_gate = c.sums("grad_gate");
  for (int64_t token = 0; token < c.tokens(); ++token)
    for (int32_t i = 0; i < c.channels; ++i) {
      const int64_t at = token * c.row() + i, modulation = c.modulation_of(token) + i;
      out.exact[at] = x.at(at) + double{y.at(at)} * gate.at(modulation);
      grad_y.exact[at] = double{grad_out.at(at)} * gate.at(modulation);
      grad_gate.exact[modulation] += double{grad_out.at(at)} * y.at(at);
    }
  GatedResidualParams p;
  p.shape = c.shape();
  p.x = c.input(x), p.y = c.input(y), p.gate = c.modulation(gate), p.out = c.output(out);
  check("gated_residual", kernels.gated_residual, p, {&out}, thread_counts);

  Buffer workspace(DType::float32, kernels.gated_residual_backward_workspace_floats(c.shape()));
  GatedResidualBackwardParams b;
  b.shape = c.shape();
  b.grad_out = c.input(grad_out), b.y = c.input(y), b.gate = c.modulation(gate), b.workspace = workspace.floats();
  b.grad_y = c.output(grad_y), b.grad_gate = grad_gate.actual.floats();
  check("gated_residual backward", kernels.gated_residual_backward, b, {&grad_y, &grad_gate}, thread_counts);
}

inline void check_all(const Kernels& kernels, const std::vector<int>& thread_counts) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Case& c :
         {Case{dtype, 2, 3, 5, 64, 0, 0}, Case{dtype, 1, 2, 140, 40, 0, 0}, Case{dtype, 2, 1, 3, 99, 0, 0},
          Case{dtype, 1, 2, 9, 1032, 8, 0}, Case{dtype, 1, 2, 4, 32, 3, 1}, Case{dtype, 2, 2, 50, 200, 0, 0}}) {
      check_layer_norm(c, kernels, thread_counts), check_gated_residual(c, kernels, thread_counts);
    }
}

}  // namespace selfforcing::modulate_test
