// Every wrapper of csrc/ptx against a plain loop. Compiled by g++ it tests the emulation; compiled by nvcc (-x cu) and
// run on a GPU, the instructions themselves, before any kernel that is built on them.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/ptx/mma.cuh"
#include "../../csrc/ptx/vector.cuh"
#include "ptx_test.h"
#include "test_ptx_hopper.h"

namespace {

constexpr int kSide = 8, kMatrices = 4, kLoaded = kMatrices * kSide * kSide;

// Four matrices, one row after the other, and what every lane gets of them.
__global__ void load_kernel(const uint16_t* from, unsigned* plain, unsigned* transposed) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  uint16_t* const rows = reinterpret_cast<uint16_t*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < kLoaded; i += ptx::kWarpSize) rows[i] = from[i];
  __syncthreads();
  const ptx::SharedAddress row = ptx::shared_address(shared) + threadIdx.x * kSide * sizeof(uint16_t);
  unsigned registers[4];
  ptx::load_matrices(registers, row);
  for (int i = 0; i < 4; ++i) plain[threadIdx.x * 4 + i] = registers[i];
  ptx::load_matrices_transposed(registers, row);
  for (int i = 0; i < 4; ++i) transposed[threadIdx.x * 4 + i] = registers[i];
}

void test_load_matrices() {
  Shared<uint16_t> from(kLoaded);
  Shared<unsigned> plain(4 * ptx::kWarpSize), transposed(4 * ptx::kWarpSize);
  for (int i = 0; i < kLoaded; ++i) from[i] = static_cast<uint16_t>(i * 257 + 3);
  run(load_kernel, ptx::kWarpSize, kLoaded * sizeof(uint16_t), from.data(), plain.data(), transposed.data());
  int wrong = 0;
  for (int lane = 0; lane < ptx::kWarpSize; ++lane)
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const uint16_t* m = from.data() + matrix * kSide * kSide;
      const int group = lane / 4, pair = lane % 4 * 2;
      const unsigned row = m[group * kSide + pair] | static_cast<unsigned>(m[group * kSide + pair + 1]) << 16;
      const unsigned column = m[pair * kSide + group] | static_cast<unsigned>(m[(pair + 1) * kSide + group]) << 16;
      wrong += plain[lane * 4 + matrix] != row;
      wrong += transposed[lane * 4 + matrix] != column;
    }
  expect(wrong == 0, "load_matrices, plain and transposed");
}

constexpr int kRows = 16, kColumns = 8, kDepth = 16;

// sum += a b with a [16, 16], b [16, 8] and sum [16, 8] in device memory, all by rows.
template <typename T>
__global__ void multiply_kernel(const float* a, const float* b, float* sum) {
  const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4 * 2;
  unsigned left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const float* element = a + (group + i % 2 * 8) * kDepth + pair + i / 2 * 8;
    left[i] = ptx::pack_pair<T>(element[0], element[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* element = b + (pair + i * 8) * kColumns + group;
    right[i] = ptx::pack_pair<T>(element[0], element[kColumns]);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = sum[(group + i / 2 * 8) * kColumns + pair + i % 2];
  ptx::multiply_add<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) sum[(group + i / 2 * 8) * kColumns + pair + i % 2] = sums[i];
}

// Small integers: every product and sum is exact, in whatever order they are added.
template <typename T>
void test_multiply_add(const char* what) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> integers(-8, 8);
  Shared<float> a(kRows * kDepth), b(kDepth * kColumns), sum(kRows * kColumns);
  for (Shared<float>* matrix : {&a, &b, &sum})
    for (size_t i = 0; i < matrix->size(); ++i) (*matrix)[i] = static_cast<float>(integers(random));
  std::vector<float> exact(sum.data(), sum.data() + sum.size());
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < kColumns; ++column)
      for (int k = 0; k < kDepth; ++k) exact[row * kColumns + column] += a[row * kDepth + k] * b[k * kColumns + column];
  run(multiply_kernel<T>, ptx::kWarpSize, 0, static_cast<const float*>(a.data()), static_cast<const float*>(b.data()),
      sum.data());
  int wrong = 0;
  for (size_t i = 0; i < exact.size(); ++i) wrong += sum[i] != exact[i];
  expect(wrong == 0, what);
}

constexpr int kCopyThreads = 64, kCopyFloats = 4 * kCopyThreads;

// Two groups of copies, of 16 and of 8 bytes; every third copies nothing. Out: what shared memory holds once all is
// there.
__global__ void copy_kernel(const float* from, float* out) {
  SELFFORCING_DYNAMIC_SHARED(shared);
  const ptx::SharedAddress target = ptx::shared_address(shared) + threadIdx.x * 16;
  ptx::copy_async(target, from + threadIdx.x * 4, threadIdx.x % 3 ? 16 : 0);
  ptx::commit_copies();
  for (int half = 0; half < 2; ++half)
    ptx::copy_async_8(target + kCopyFloats * sizeof(float) + half * 8, from + kCopyFloats + threadIdx.x * 4 + half * 2,
                      (threadIdx.x + half) % 3 ? 8 : 0);
  ptx::commit_copies();
  const float* floats = reinterpret_cast<const float*>(shared);
  ptx::wait_for_copies<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const int index = (static_cast<int>(threadIdx.x) * 4 + i + 4) % kCopyFloats;  // a neighbour's
    out[index] = floats[index];
  }
  ptx::wait_for_copies<0>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const int index = kCopyFloats + (static_cast<int>(threadIdx.x) * 4 + i + 4) % kCopyFloats;
    out[index] = floats[index];
  }
}

void test_copies() {
  Shared<float> from(2 * kCopyFloats), out(2 * kCopyFloats);
  for (int i = 0; i < 2 * kCopyFloats; ++i) from[i] = static_cast<float>(i + 1), out[i] = -1;
  run(copy_kernel, kCopyThreads, 2 * kCopyFloats * sizeof(float), static_cast<const float*>(from.data()), out.data());
  int wrong = 0;
  for (int i = 0; i < 2 * kCopyFloats; ++i) {
    const int thread = i % kCopyFloats / 4, half = i < kCopyFloats ? 0 : i % 4 / 2;
    wrong += out[i] != ((thread + half) % 3 == 0 ? 0.0f : from[i]);
  }
  expect(wrong == 0, "copy_async and copy_async_8, in two groups, with and without a source");
}

__global__ void arithmetic_kernel(const float* x, float* power, unsigned* bfloat16_pair, unsigned* float16_pair) {
  power[threadIdx.x] = ptx::fast_exp2(x[threadIdx.x]);
  bfloat16_pair[threadIdx.x] = ptx::pack_pair<bfloat16>(x[threadIdx.x], -x[threadIdx.x]);
  float16_pair[threadIdx.x] = ptx::pack_pair<float16>(x[threadIdx.x], -x[threadIdx.x]);
}

void test_arithmetic() {
  constexpr int kValues = 64;
  Shared<float> x(kValues), power(kValues);
  Shared<unsigned> bfloat16_pair(kValues), float16_pair(kValues);
  for (int i = 0; i < kValues; ++i) x[i] = (static_cast<float>(i) - 48) * 0.37f;
  x[0] = -INFINITY, x[1] = -200, x[2] = 0;
  run(arithmetic_kernel, kValues, 0, static_cast<const float*>(x.data()), power.data(), bfloat16_pair.data(),
      float16_pair.data());
  int wrong_power = 0, wrong_pair = 0;
  for (int i = 0; i < kValues; ++i) {
    const double exact = std::exp2(static_cast<double>(x[i]));
    wrong_power += std::fabs(power[i] - (exact < 0x1p-126 ? 0 : exact)) > 3e-7 * exact;
    // The low half is x, the high half -x, each a narrow float next to it.
    const auto wide = [](unsigned bits) {
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    };
    const float low = wide(bfloat16_pair[i] << 16), high = wide(bfloat16_pair[i] & 0xffff0000u);
    wrong_pair += !(low == x[i] || std::fabs(low - x[i]) <= 0x1p-8f * std::fabs(x[i])) || high != -low;
    wrong_pair += (float16_pair[i] >> 16) != ((float16_pair[i] & 0xffffu) ^ 0x8000u);
  }
  expect(wrong_power == 0, "fast_exp2");
  expect(wrong_pair == 0, "pack_pair");
  expect(float16_pair[2] == 0x80000000u, "pack_pair<float16> of 0 and -0");
}

constexpr int kSelections = 6;

// Words of `from` by loads of 8 and of 16 bytes, and bytes of the first two.
__global__ void words_kernel(const unsigned* from, const unsigned* selectors, unsigned* loaded, unsigned* selected) {
  const uint2 two = ptx::load_once<uint2>(from);
  const uint4 four = ptx::load_once<uint4>(from + 4);
  loaded[0] = two.x, loaded[1] = two.y;
  loaded[2] = four.x, loaded[3] = four.y, loaded[4] = four.z, loaded[5] = four.w;
  for (int i = 0; i < kSelections; ++i) selected[i] = ptx::select_bytes(two.x, two.y, selectors[i]);
}

void test_words() {
  Shared<unsigned> from(8), selectors(kSelections), loaded(6), selected(kSelections);
  for (unsigned i = 0; i < 8; ++i) from[i] = 0x83a1c0f7u * (i + 1);
  for (int i = 0; i < kSelections; ++i) selectors[i] = (0x7404u + 0x1357u * static_cast<unsigned>(i * i)) & 0x7777;
  run(words_kernel, 1, 0, static_cast<const unsigned*>(from.data()), static_cast<const unsigned*>(selectors.data()),
      loaded.data(), selected.data());
  int wrong_word = 0, wrong_byte = 0;
  for (int i = 0; i < 6; ++i) wrong_word += loaded[i] != from[i < 2 ? i : i + 2];
  for (int i = 0; i < kSelections; ++i)
    for (int place = 0; place < 4; ++place) {
      const unsigned number = selectors[i] >> 4 * place & 7;
      wrong_byte += (selected[i] >> 8 * place & 0xff) != (from[number / 4] >> number % 4 * 8 & 0xff);
    }
  expect(wrong_word == 0, "load_once of 8 and of 16 bytes");
  expect(wrong_byte == 0, "select_bytes");
}

}  // namespace

int main() {
  test_load_matrices();
  test_multiply_add<bfloat16>("multiply_add<bfloat16>");
  test_multiply_add<float16>("multiply_add<float16>");
  test_copies();
  test_arithmetic();
  test_words();
  test_hopper();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
