// What the tests of elementwise kernels share: random inputs and NaN-filled outputs in memory of exactly their size,
// and the comparison of a kernel with its definition in float64.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "elements.h"

namespace selfforcing::kernel_test {

// Elements of one dtype in a heap allocation of their own, behind `offset` elements that spoil the alignment. Filled
// with 0xff, which is NaN in every dtype.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype), count_(count), offset_(offset), bytes_((count + offset) * element_size(dtype), 0xff) {}

  // Normal random numbers.
  Buffer& fill(float scale = 1.0f, float shift = 0.0f) {
    static std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count_; ++i) set(i, shift + scale * normal(random));
    return *this;
  }
  void clear() { bytes_.assign(bytes_.size(), 0xff); }

  void* data() { return bytes_.data() + offset_ * element_size(dtype_); }
  float* floats() { return static_cast<float*>(data()); }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  float at(int64_t i) const { return to_float(dtype_, bytes_.data(), offset_ + i); }
  void set(int64_t i, float value) { from_float(dtype_, bytes_.data(), offset_ + i, value); }
  bool written(int64_t i) const {
    const int size = element_size(dtype_);
    for (int byte = 0; byte < size; ++byte)
      if (bytes_[(offset_ + i) * size + byte] != 0xff) return true;
    return false;
  }

 private:
  DType dtype_;
  int64_t count_, offset_;
  std::vector<unsigned char> bytes_;
};

// What a kernel wrote, and what it should have written: NaN where nothing.
struct Output {
  const char* name;
  Buffer actual;
  std::vector<double> exact;
  Output(const char* name, DType dtype, int64_t count, int64_t offset = 0)
      : name(name), actual(dtype, count, offset), exact(count, kNaN) {}
};

inline int passed = 0, failed = 0;

inline void expect(bool right, const std::string& what) {
  right ? ++passed : ++failed;
  if (!right) std::printf("FAILED  %s\n", what.c_str());
}

// A result is off by half a unit in its last place and by a few float32 roundings of the largest terms.
inline void compare(const std::string& what, const Output& output) {
  constexpr double kRounding[] = {0, 0x1p-8, 0x1p-11}, kTerms = 4e-6;
  const double rounding = kRounding[static_cast<int>(output.actual.dtype())];
  double largest = 0;
  for (double value : output.exact)
    if (!std::isnan(value)) largest = std::fmax(largest, std::fabs(value));
  for (int64_t i = 0; i < output.actual.count(); ++i) {
    const double exact = output.exact[i], actual = output.actual.at(i);
    const double allowed = rounding * std::fabs(exact) + kTerms * largest;
    const bool right = std::isnan(exact) ? !output.actual.written(i) : std::fabs(actual - exact) <= allowed;
    if (right) continue;
    return expect(false, what + ": " + output.name + "[" + std::to_string(i) + "] is " + std::to_string(actual) +
                             ", but must be " + std::to_string(exact));
  }
  expect(largest > 0, what + ": " + output.name + " is not all zero");
}

// Runs a kernel on one thread and compares what it wrote into `outputs` (where params point) with what is exact, then
// on each of `thread_counts` threads, which must give the same bits.
template <typename Params>
void check(const std::string& what, void (*kernel)(const Params&), Params params, const std::vector<Output*>& outputs,
           const std::vector<int>& thread_counts) {
  const std::string name = what + ", " + dtype_name(outputs[0]->actual.dtype());
  try {
    kernel(params);
    std::vector<std::vector<unsigned char>> first;
    for (const Output* output : outputs) {
      compare(name, *output);
      first.push_back(output->actual.bytes());
    }
    for (int num_threads : thread_counts) {
      for (Output* output : outputs) output->actual.clear();
      params.parallel = {num_threads, run_on_threads};
      kernel(params);
      bool same = true;
      for (size_t i = 0; i < outputs.size(); ++i) same = same && outputs[i]->actual.bytes() == first[i];
      expect(same, name + ": " + std::to_string(num_threads) + " threads give the bits of one");
    }
  } catch (const std::exception& error) {
    expect(false, name + ": " + error.what());
  }
}

inline bool report() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0;
}

}  // namespace selfforcing::kernel_test
