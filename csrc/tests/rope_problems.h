// Rotary embedding problems for the tests of every kernel, and what the kernels must compute, in float64.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "../rope/params.h"
#include "elementwise.h"

namespace selfforcing::rope_test {

using namespace kernel_test;

struct Kernels {
  int64_t (*table_floats)(const RopeParams&);  // nullptr: they need no table
  void (*rope_3d)(const RopeParams&);
  void (*qk_norm_rope)(const QkNormRopeParams&);
  int64_t (*qk_norm_rope_backward_workspace_floats)(const QkNormRopeBackwardParams&);
  void (*qk_norm_rope_backward)(const QkNormRopeBackwardParams&);
};

// Heads that follow each other, with `gap` elements between tokens, `offset` in front.
struct Case {
  DType dtype;
  int32_t batch, num_heads, head_dim, frames, rows, columns;
  std::vector<int32_t> start_frames;  // one or, of every stream, its own
  int64_t gap, offset;

  int64_t tokens_of_stream() const { return static_cast<int64_t>(frames) * rows * columns; }
  int64_t tokens() const { return batch * tokens_of_stream(); }
  int64_t features() const { return static_cast<int64_t>(num_heads) * head_dim; }
  int64_t row() const { return features() + gap; }
  Buffer random() const { return Buffer(dtype, tokens() * row(), offset).fill(); }
  Output empty(const char* name) const { return Output(name, dtype, tokens() * row(), offset); }
  template <typename Pointer>
  Heads<Pointer> heads(Buffer& buffer) const {
    return {buffer.data(), tokens_of_stream() * row(), row(), head_dim};
  }
  void describe(RopeParams& p) const {
    p.dtype = dtype, p.batch = batch, p.num_heads = num_heads, p.head_dim = head_dim;
    p.axes = RopeAxes(frames, rows, columns, head_dim);
    p.start_frame = start_frames.data(), p.num_starts = static_cast<int32_t>(start_frames.size());
  }

  // The angle of a channel pair of one of the B * L tokens: a third of the pairs, rounded down, turns with the column,
  // as many with the row, the others with the frame.
  double angle(int64_t token, int32_t pair) const {
    const int32_t third = head_dim / 2 / 3, of_frame = head_dim / 2 - 2 * third;
    const auto turn = [](int64_t position, int32_t j, int32_t pairs) {
      return position * std::pow(10000.0, -static_cast<double>(j) / pairs);
    };
    const int64_t column = token % columns, row = token / columns % rows, frame = token / columns / rows % frames;
    const int32_t start = start_frames[start_frames.size() == 1 ? 0 : token / tokens_of_stream()];
    if (pair < of_frame) return turn(start + frame, pair, of_frame);
    if (pair < of_frame + third) return turn(row, pair - of_frame, third);
    return turn(column, pair - of_frame - third, third);
  }
  // Turns the features of a token, forwards or backwards.
  void rotate(std::vector<double>& x, int64_t token, bool backwards) const {
    for (int64_t i = 0; i < features(); i += 2) {
      const double turn = angle(token, i % head_dim / 2) * (backwards ? -1 : 1);
      const double real = x[i], imaginary = x[i + 1];
      x[i] = real * std::cos(turn) - imaginary * std::sin(turn);
      x[i + 1] = real * std::sin(turn) + imaginary * std::cos(turn);
    }
  }
  std::vector<double> features_of(const Buffer& x, int64_t token) const {
    std::vector<double> values(features());
    for (int64_t i = 0; i < features(); ++i) values[i] = x.at(token * row() + i);
    return values;
  }
};

// The table that kernels fill first.
inline Buffer table_for(RopeParams& p, int64_t (*floats)(const RopeParams&)) {
  Buffer table(DType::float32, floats == nullptr ? 0 : floats(p));
  p.table = table.floats();
  return table;
}

inline void check_rope_3d(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  Buffer x = c.random();
  for (const bool inverse : {false, true}) {
    Output y = c.empty("y");
    for (int64_t token = 0; token < c.tokens(); ++token) {
      std::vector<double> values = c.features_of(x, token);
      c.rotate(values, token, inverse);
      for (int64_t i = 0; i < c.features(); ++i) y.exact[token * c.row() + i] = values[i];
    }
    RopeParams p;
    c.describe(p);
    p.inverse = inverse;
    p.x = c.heads<const void*>(x), p.y = c.heads<void*>(y.actual);
    Buffer table = table_for(p, kernels.table_floats);
    check(inverse ? "rope_3d backwards" : "rope_3d", kernels.rope_3d, p, {&y}, thread_counts);
  }
}

inline void check_qk_norm_rope(const Case& c, const Kernels& kernels, const std::vector<int>& thread_counts) {
  constexpr float kEps = 1e-6f;
  Buffer x = c.random(), grad_y = c.random(), weight = Buffer(DType::float32, c.features()).fill(0.3f, 1.0f);
  Output y = c.empty("y"), rstd("rstd", DType::float32, c.tokens());
  Output grad_x("grad_x", c.dtype, c.tokens() * c.features(), c.offset);
  Output grad_weight("grad_weight", DType::float32, c.features());
  grad_weight.exact.assign(c.features(), 0);
  for (int64_t token = 0; token < c.tokens(); ++token) {
    std::vector<double> values = c.features_of(x, token), grads = c.features_of(grad_y, token);
    double squares = 0, product = 0;
    for (const double value : values) squares += value * value;
    const double factor = 1 / std::sqrt(squares / c.features() + kEps);
    rstd.exact[token] = factor;
    c.rotate(grads, token, true);
    for (int64_t i = 0; i < c.features(); ++i) {
      grad_weight.exact[i] += grads[i] * values[i] * factor;
      product += grads[i] * weight.at(i) * values[i] * factor;
    }
    for (int64_t i = 0; i < c.features(); ++i) {
      const double normal = values[i] * factor;
      grad_x.exact[token * c.features() + i] = factor * (grads[i] * weight.at(i) - normal * product / c.features());
      values[i] = normal * weight.at(i);
    }
    c.rotate(values, token, false);
    for (int64_t i = 0; i < c.features(); ++i) y.exact[token * c.row() + i] = values[i];
  }
  QkNormRopeParams p;
  c.describe(p);
  p.x = c.heads<const void*>(x), p.weight = weight.floats(), p.eps = kEps;
  p.y = c.heads<void*>(y.actual), p.rstd = rstd.actual.floats();
  Buffer table = table_for(p, kernels.table_floats);
  check("qk_norm_rope", kernels.qk_norm_rope, p, {&y, &rstd}, thread_counts);

  QkNormRopeBackwardParams b;
  c.describe(b);
  b.inverse = true;
  b.x = c.heads<const void*>(grad_y), b.features = c.heads<const void*>(x);
  b.weight = weight.floats(), b.rstd = rstd.actual.floats(), b.table = p.table;
  b.grad_x = grad_x.actual.data(), b.grad_weight = grad_weight.actual.floats();
  Buffer workspace(DType::float32, kernels.qk_norm_rope_backward_workspace_floats(b));
  b.workspace = workspace.floats();
  check("qk_norm_rope backward", kernels.qk_norm_rope_backward, b, {&grad_x, &grad_weight}, thread_counts);
}

inline void check_all(const Kernels& kernels, const std::vector<int>& thread_counts) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Case& c : {Case{dtype, 2, 3, 32, 2, 3, 4, {5}, 0, 0}, Case{dtype, 1, 2, 40, 3, 2, 2, {0}, 0, 0},
                          Case{dtype, 1, 1, 128, 2, 5, 5, {700}, 8, 0}, Case{dtype, 2, 2, 8, 1, 3, 2, {1}, 3, 1},
                          Case{dtype, 1, 12, 64, 9, 4, 4, {30}, 0, 0}, Case{dtype, 3, 2, 16, 2, 2, 3, {4, 4, 4}, 0, 0},
                          Case{dtype, 4, 3, 32, 3, 3, 4, {7, 2, 2, 50}, 0, 0}}) {
      check_rope_3d(c, kernels, thread_counts), check_qk_norm_rope(c, kernels, thread_counts);
    }
}

}  // namespace selfforcing::rope_test
