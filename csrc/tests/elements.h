// What the tests of every kernel share: elements of all dtypes, threads, names for messages.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../geometry/tensor.h"

namespace selfforcing::kernel_test {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline float to_float(DType dtype, const void* data, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (dtype == DType::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? kNaN : sign * kInfinity;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

// Values whose 7 leading fraction bits say everything are exact in all three dtypes.
inline void from_float(DType dtype, void* data, int64_t index, float value) {
  if (dtype == DType::float32) {
    static_cast<float*>(data)[index] = value;
    return;
  }
  uint16_t& bits = static_cast<uint16_t*>(data)[index];
  if (std::isnan(value)) {
    bits = dtype == DType::bfloat16 ? 0x7fc0 : 0x7e00;
  } else if (dtype == DType::bfloat16) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    bits = static_cast<uint16_t>(wide >> 16);
  } else if (std::fabs(value) < 0x1p-14f) {
    bits = value < 0 ? 0x8000 : 0;
  } else {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
    bits = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | ((exponent + 14) << 10) |
                                 (static_cast<int>(fraction * 2048) & 1023));
  }
}

inline int element_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// For Parallel::run.
inline void run_on_threads(int32_t num_workers, void (*body)(void*, int32_t), void* context) {
  std::vector<std::thread> threads;
  for (int32_t worker = 1; worker < num_workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace selfforcing::kernel_test
